"""Every entry of the family table, held against the modules it describes."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer
from support import tiny

from mlx_flash.errors import ModelError
from mlx_flash.models import families
from mlx_flash.models.families import FAMILIES, Ffn
from mlx_flash.models.registry import get_classes

ACTIVATIONS = {
    "silu": lambda x: x / (1 + mx.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + mx.erf(x / math.sqrt(2))),
    "gelu_approx": lambda x: (
        0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
    "fatrelu": lambda x: mx.where(x > FATRELU, x, 0),
}
FATRELU = 0.1  # the threshold in tiny.py


def xielu(x, act):
    """The activation of Apertus, from the parameters in its module."""
    positive = mx.log(1 + mx.exp(act.alpha_p))
    negative = act.beta + mx.log(1 + mx.exp(act.alpha_n))
    linear = act.beta * x
    return linear + mx.where(
        x > 0, positive * x * x, negative * (mx.exp(mx.minimum(x, act.eps)) - 1 - x)
    )


def affine(linear, x, rows=slice(None)):
    """x times some rows of a linear layer's weight, with its bias if it has one."""
    y = x @ linear.weight[rows].T
    return y + linear.bias[rows] if "bias" in linear else y


def norm(module, x):
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + module.eps) * module.weight


def reference(module, ffn: Ffn, x, act):
    """What the table says that the module computes."""
    names = families.projections(ffn)
    if ffn.norm:
        x = norm(module[ffn.norm], x)
    down = module[names["down"]]
    rows = down.weight.shape[1]
    up_act = ACTIVATIONS[ffn.up_activation] if ffn.up_activation else lambda x: x
    if ffn.fused:
        gate = affine(module[ffn.fused], x, slice(0, rows))
        up = affine(module[ffn.fused], x, slice(rows, 2 * rows))
        return affine(down, act(gate) * up)
    up = affine(module[names["up"]], x)
    if "gate" not in names:
        return affine(down, act(up))
    return affine(down, act(affine(module[names["gate"]], x)) * up_act(up))


class Evaluated(nn.Module):
    """A linear layer that forces an eval of its input, as reading rows would."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.calls = 0

    def __call__(self, x):
        mx.eval(x)
        self.calls += 1
        return self.linear(x)


def load(path, model_type, **overrides):
    tiny.make_checkpoint(path, model_type, **overrides)
    model, config = load_model(path, get_model_classes=get_classes)
    return model, families.find(config)


def largest(x):
    return mx.abs(x).max().item()


def check_module(module, ffn: Ffn):
    """The module computes what the table says, and what no other activation gives."""
    rows = {name: module[name].weight.shape for name in families.projections(ffn).values()}
    width, down_rows = rows[ffn.down]
    in_rows = 2 * down_rows if ffn.fused else down_rows
    assert all(shape == (in_rows, width) for name, shape in rows.items() if name != ffn.down)

    x = mx.random.normal((2, 3, width), key=mx.random.key(7))
    y = module(x)
    assert mx.all(mx.isfinite(y)).item()
    known = dict(ACTIVATIONS)
    if ffn.activation == "xielu":
        known["xielu"] = lambda h: xielu(h, module.act_fn)
    assert largest(y - reference(module, ffn, x, known.pop(ffn.activation))) < 1e-5
    for act in known.values():
        assert largest(y - reference(module, ffn, x, act)) > 1e-5
    if ffn.up_activation:
        other = replace(ffn, up_activation=None)
        assert largest(y - reference(module, other, x, ACTIVATIONS[ffn.activation])) > 1e-5


def check_eval_inside(model, found, ffn: Ffn):
    """The forward runs through the found modules, and never inside a compiled function."""
    prompt = mx.array([[1, 2, 3]])
    expected = model(prompt, cache=make_prompt_cache(model))
    for _, module in found:
        module[ffn.down] = Evaluated(module[ffn.down])
    assert mx.allclose(model(prompt, cache=make_prompt_cache(model)), expected, atol=1e-4).item()
    calls = {module[ffn.down].calls for _, module in found}
    assert calls in ({1}, {2})  # some families run the stack of layers twice


def test_tiny_has_every_family():
    assert set(tiny.TINY) == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_family(model_type, tmp_path):
    model, ffn = load(tmp_path, model_type)
    found = families.modules(model, ffn)
    assert len(found) == len(model.layers) == 4
    named = dict(model.named_modules())
    prefixes = set()
    for (path, module), layer in zip(found, model.layers, strict=True):
        assert named[path] is module
        assert module is getattr(layer, ffn.module)
        prefixes.add(path)
        check_module(module, ffn)
    assert len(prefixes) == 4
    assert all(path.endswith(f".{ffn.module}") for path in prefixes)

    tokenizer = load_tokenizer(tmp_path)
    steps = list(stream_generate(model, tokenizer, "Hello", max_tokens=6))
    assert steps
    assert all(0 <= step.token < tiny.VOCAB for step in steps)
    check_eval_inside(model, found, ffn)


@pytest.mark.parametrize(
    ("model_type", "override"),
    [
        ("llama", {"mlp_bias": True}),
        ("ernie4_5", {"use_bias": True}),
        ("internlm3", {"bias": True}),
        ("qwen", {"no_bias": False}),
        ("nemotron", {"mlp_bias": True}),
        ("sparsellama", {"mlp_bias": True}),
    ],
)
def test_family_with_biases(model_type, override, tmp_path):
    model, ffn = load(tmp_path, model_type, layers=2, **override)
    for _, module in families.modules(model, ffn):
        assert all("bias" in module[name] for name in families.projections(ffn).values())
        check_module(module, ffn)


@pytest.mark.parametrize(
    ("model_type", "key", "value", "activation"),
    [
        ("nemotron-nas", "hidden_act", "relu", "relu"),
        ("nemotron-nas", "hidden_act", "gelu_new", "gelu_approx"),
        ("opt", "activation_function", "gelu", "gelu"),
        ("falcon", "activation", "relu", "relu"),
        ("persimmon", "hidden_act", "relu", "relu"),
        ("gear", "hidden_activation", "silu", "silu"),
        ("gear", "hidden_activation", "gelu", "gelu"),
        ("llama", "hidden_act", "relu", "relu"),
        ("llama", "hidden_act", "relu2", "relu2"),
        ("llama", "hidden_act", "gelu", "gelu"),
        ("mistral", "hidden_act", "relu", "relu"),
        ("minicpm", "hidden_act", "relu", "relu"),
        ("phi", "hidden_act", "relu", "relu"),
        ("phi", "hidden_act", "gelu", "gelu"),
        ("sparsellama", "hidden_act", "silu", "silu"),
        ("gemma", "hidden_act", "gelu", "gelu_approx"),
        ("gemma2", "hidden_activation", "gelu", "gelu"),
        ("gpt2", "activation_function", "relu", "relu"),
        ("gpt_neox", "hidden_act", "gelu", "gelu"),
        ("gptj", "activation_function", "gelu", "gelu"),
        ("starcoder2", "hidden_act", "gelu", "gelu"),
        ("RefinedWeb", "activation", "relu", "relu"),
    ],
)
def test_family_that_follows_its_config(model_type, key, value, activation, tmp_path):
    model, ffn = load(tmp_path, model_type, layers=2, **{key: value})
    assert ffn.activation == activation
    for _, module in families.modules(model, ffn):
        check_module(module, ffn)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "minicpm", "phi", "sparsellama"])
def test_family_with_another_activation(model_type, tmp_path):
    """Only the activation changes: the same weights under the same names, the rest mlx-lm's."""
    act = {"hidden_act": "fatrelu", "hidden_act_param": FATRELU}
    model, ffn = load(tmp_path / "fat", model_type, layers=2, **act)
    assert (ffn.activation, ffn.threshold, ffn.overridden) == ("fatrelu", FATRELU, True)
    for _, module in families.modules(model, ffn):
        check_module(module, ffn)
    usual = "gelu_new" if model_type == "phi" else "silu"
    other, ffn = load(tmp_path / "usual", model_type, layers=2, hidden_act=usual)
    assert not ffn.overridden
    # Of mlx-lm or, of minicpm, without another FFN.
    assert all("activation_override" not in type(m).__module__ for m in other.modules())
    names = [[name for name, _ in tree_flatten(m.parameters())] for m in (model, other)]
    assert sorted(names[0]) == sorted(names[1])


def test_per_layer_widths_may_differ(tmp_path):
    model, ffn = load(tmp_path, "openelm")
    widths = {module.proj_2.weight.shape[1] for _, module in families.modules(model, ffn)}
    assert len(widths) == 2


def test_quantized_layers_are_found(tmp_path):
    model, ffn = load(tmp_path, "llama", intermediate_size=192)
    nn.quantize(model, group_size=64, bits=4)
    found = families.modules(model, ffn)
    assert [path for path, _ in found] == [f"model.layers.{n}.mlp" for n in range(4)]


def test_shards_hold_the_same_model(tmp_path):
    prompt = mx.array([[1, 2, 3]])
    whole = tiny.make_checkpoint(tmp_path / "whole", "qwen3", dtype="bfloat16", seed=3)
    parts = tiny.make_checkpoint(tmp_path / "parts", "qwen3", dtype="bfloat16", seed=3, shards=3)
    assert len(list(parts.glob("model-*-of-00003.safetensors"))) == 3
    logits = [load_model(path)[0](prompt) for path in (whole, parts)]
    assert logits[0].dtype == mx.bfloat16
    assert mx.array_equal(*logits).item()


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(ModelError, match=r"model_type 'qwen9'.*known: .*llama, .*starcoder2"):
        families.find({"model_type": "qwen9"})
    with pytest.raises(ModelError, match=r"model_type None"):
        families.find({})


@pytest.mark.parametrize(
    ("model_type", "key", "value", "expected"),
    [
        ("qwen2", "hidden_act", "relu", "hidden_act .* 'relu', but mlx-lm computes silu"),
        ("llama", "hidden_act", "mish", "'mish'; expected one of relu, .*, silu, swish, fatrelu"),
        ("llama", "hidden_act", ["relu"], r"\['relu'\]; expected one of relu"),
        ("llama", "activation_function", "relu", "two activations, hidden_act 'silu' and act"),
        ("llama", "hidden_act", "fatrelu", "hidden_act_param .* is None; expected a number"),
        ("sparsellama", "hidden_act_param", -0.1, "is -0.1; expected a number, 0 or more"),
        ("sparsellama", "hidden_act_param", "0.1", "is '0.1'; expected a number"),
        ("sparsellama", "hidden_act_param", math.nan, "is nan; expected a number"),
        ("bamboo", "hidden_act", "silu", "'silu'; expected one of relu$"),
        ("phi", "hidden_act", "mish", "'mish'; expected one of relu"),
        ("gemma4_text", "hidden_activation", "silu", "computes gelu_approx"),
        ("gemma", "hidden_activation", "silu", "two activations, hidden_act 'gelu' and hidden"),
        ("gpt2", "activation_function", "mish", "'mish'; expected one of relu"),
        ("nemotron", "hidden_act", "silu", "expected relu2"),
        ("gear", "hidden_activation", "mish", "expected one of"),
        ("opt", "activation_function", "mish", "expected one of relu, relu2, gelu"),
        ("falcon", "activation", "mish", "expected one of relu, relu2, gelu"),
        (
            "falcon",
            "hidden_act",
            "relu",
            "two activations, activation 'gelu' and hidden_act",
        ),
        ("persimmon", "hidden_act", "mish", "expected one of relu, relu2, gelu"),
        ("muse_glimmer", "text_config", {"hidden_activation": "relu"}, "'relu'"),
    ],
)
def test_ignored_activation_is_an_error(model_type, key, value, expected):
    with pytest.raises(ModelError, match=expected):
        families.find(tiny.config(model_type) | {key: value})


def test_activation_may_be_absent_or_null():
    assert families.find({"model_type": "llama"}) is FAMILIES["llama"]
    assert families.find({"model_type": "llama", "hidden_act": None}) is FAMILIES["llama"]


@pytest.mark.parametrize(
    ("ffn", "zeros"),
    [
        (Ffn(activation="relu"), True),
        (Ffn(activation="relu2"), True),
        (Ffn(activation="fatrelu", threshold=FATRELU), True),
        (Ffn(activation="relu", up_activation="relu"), True),
        (Ffn(), False),
        (Ffn(activation="gelu"), False),
        (Ffn(activation="gelu_approx"), False),
    ],
)
def test_functions(ffn, zeros):
    x = mx.concatenate([mx.linspace(-3, 3, 61), mx.array([0.0, -0.0])])
    found = families.gate_function(ffn)(x)
    assert mx.allclose(found, ACTIVATIONS[ffn.activation](x), atol=1e-6).item()
    assert families.gate_function(ffn)(x.astype(mx.bfloat16)).dtype == mx.bfloat16
    assert families.has_zeros(ffn) is zeros
    below = mx.where(x <= ffn.threshold, found, 0)
    assert mx.any(below != 0).item() is not zeros
    expected = ACTIVATIONS["relu"](x) if ffn.up_activation else x
    assert mx.array_equal(families.up_function(ffn)(x), expected).item()


def test_no_function():
    assert not families.has_zeros(FAMILIES["apertus"])
    with pytest.raises(ModelError, match="xielu is no function of one argument"):
        families.gate_function(FAMILIES["apertus"])
    with pytest.raises(ModelError, match=r"threshold of fatrelu is -0\.5; expected 0 or more"):
        families.gate_function(Ffn(activation="fatrelu", threshold=-0.5))


@pytest.mark.parametrize("model_type", [m for m, ffn in FAMILIES.items() if ffn.experts])
def test_mixture_is_an_error(model_type):
    key, largest_dense = FAMILIES[model_type].experts
    config = tiny.config(model_type)
    families.find(config | {key: largest_dense})
    with pytest.raises(ModelError, match=f"mixture of experts \\({key} is"):
        families.find(config | {key: largest_dense + 1})


def test_layer_without_ffn_is_an_error(tmp_path):
    configs = [{"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}}]
    model, _ = load(tmp_path, "nemotron-nas", layers=2)
    with pytest.raises(ModelError, match=r"layer 0 \(TransformerBlock\) has no FFN module 'ffn'"):
        families.modules(model, Ffn("ffn"))
    model, ffn = load(tmp_path, "nemotron-nas", layers=1, block_configs=configs)
    with pytest.raises(ModelError, match=r"layer 0 .* has no FFN module 'mlp'; it has: .*"):
        families.modules(model, ffn)


def test_missing_projection_is_an_error(tmp_path):
    model, _ = load(tmp_path, "llama", layers=2)
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.w1, the gate .* is missing"):
        families.modules(model, Ffn(gate="w1"))
    model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.* is a Identity"):
        families.modules(model, Ffn())

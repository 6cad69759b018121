"""Models that mlx-lm lacks or computes wrongly, against the golden files of make_golden.py."""

from __future__ import annotations

import mlx.core as mx
import pytest
from golden.reading import OWN, TOLERANCE, Golden, difference, in_chunks, one_by_one, whole
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache, RotatingKVCache, make_prompt_cache
from support.tiny import TINY, make_checkpoint

from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.huggingface import HFCheckpoint
from mlx_flash.errors import ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.registry import DECODERS, get_classes
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions

YARN = {"type": "yarn", "factor": 2.0}


def batch(model, golden):
    """Both sequences, the longer one cut; then their next tokens, one by one."""
    short, length = 4, min(map(len, golden.tokens))
    cache = make_prompt_cache(model)
    rows = mx.array([tokens[:length] for tokens in golden.tokens])
    steps = [rows[:, :short], *(rows[:, i : i + 1] for i in range(short, length))]
    found = mx.concatenate([model(step, cache=cache) for step in steps], axis=1)
    return difference(found, mx.stack([logits[:length] for logits in golden.logits]))


def padded(model, golden, steps=3):
    """Both sequences whole, the shorter one padded on the left, the last tokens one by one."""
    lengths = [len(tokens) for tokens in golden.tokens]
    padding = [max(lengths) - n for n in lengths]
    rows = [[0] * n + tokens for n, tokens in zip(padding, golden.tokens, strict=True)]
    rows = mx.array(rows)
    cache = [BatchKVCache(padding) for _ in model.layers]
    split = rows.shape[1] - steps
    parts = [rows[:, :split], *(rows[:, i : i + 1] for i in range(split, rows.shape[1]))]
    found = mx.concatenate([model(part, cache=cache) for part in parts], axis=1)
    return max(difference(found[i, n:], golden.logits[i]) for i, n in enumerate(padding))


def differences(model, golden):
    """The largest difference of each way to compute the golden logits."""
    found = {"no cache": difference(model(mx.array(golden.tokens[:1]))[0], golden.logits[0])}
    for way in (whole, one_by_one, in_chunks):
        pairs = zip(golden.tokens, golden.logits, strict=True)
        found[way.__name__] = max(difference(way(model, t), expected) for t, expected in pairs)
    return found | {"batch": batch(model, golden), "padded": padded(model, golden)}


@pytest.mark.deeper
@pytest.mark.parametrize("name", OWN)
def test_golden(tmp_path, request, name):
    golden = Golden(OWN[name])
    source = golden.write(tmp_path / "hf")
    directory = ModelDirectory(convert(source, tmp_path / "flash"))
    models = {
        f"{share} kept": load_model(directory, PagingOptions(kept_share=share))
        for share in ((0.0, 0.5, 1.0) if request.config.getoption("--whole") else (0.0,))
    }
    models["dense"] = load_model(directory, PagingOptions(use_flash=False))
    models["checkpoint"] = utils.load_model(source, get_model_classes=get_classes)[0]
    for kind, model in models.items():
        for way, worst in differences(model, golden).items():
            assert worst <= TOLERANCE, f"{kind}, {way}: {worst}"
    assert models["0.0 kept"].flash.stats().misses > 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("opt", {"activation_function": "gelu"}),
        ("opt", {"do_layer_norm_before": False, "_remove_final_layer_norm": True}),
        ("opt-galactica", {"activation_function": "gelu_new"}),
        ("falcon-7b", {"rope_theta": 500.0}),
        ("falcon-7b", {"activation": "relu"}),
        ("falcon-rw", {"alibi": False}),
        ("falcon-11b", {"rope_theta": 10000.0}),
        ("falcon-bare", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
        ("persimmon", {"partial_rotary_factor": 0.25}),
        ("persimmon", {"hidden_act": "relu"}),
        ("persimmon", {"rope_theta": 10000.0}),
        ("persimmon-scaled", {"rope_scaling": None}),
        ("persimmon-yarn", {"rope_scaling": None}),
        ("persimmon-yarn", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("falcon-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("refinedweb-7b", {"activation": "relu"}),
        ("llama-relu", {"hidden_act": "silu"}),
        ("llama-relu", {"hidden_act": "relu2"}),
        ("llama-relu", {"rope_scaling": None}),
        ("llama-relu2", {"hidden_act": "relu"}),
        ("llama-relu2", {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
        ("mistral-relu", {"hidden_act": "gelu"}),
        ("mistral-relu", {"sliding_window": None}),
        ("mistral-relu", {"sliding_window": 13}),
        ("phi-relu", {"hidden_act": "gelu_new"}),
        ("phi-relu", {"rope_theta": 10000.0}),
        ("phi-v5", {"rope_parameters": None}),
        ("phi-v5", {"hidden_act": "relu"}),
        ("nemotron", {"partial_rotary_factor": 0.25}),
        ("sparsellama", {"hidden_act": "relu"}),
        ("sparsellama", {"hidden_act": "silu"}),
        ("sparsellama", {"hidden_act_param": 0.25}),
        ("bamboo", {"model_type": "mistral"}),
        ("bamboo", {"sliding_window": None}),
        ("minicpm", {"hidden_act": "relu"}),
        ("minicpm", {"rope_theta": 1000000.0}),
        ("minicpm", {"scale_emb": 1}),
        ("minicpm", {"scale_depth": 1.0}),
        ("minicpm-fatrelu", {"dim_model_base": 32}),
    ],
)
def test_golden_tells_quirks_apart(tmp_path, name, overrides):
    """The tolerance is narrow enough: the same weights under another config are off."""
    golden = Golden(OWN[name])
    config = golden.config | overrides
    model_class, args = get_classes(config)
    model = model_class(args.from_dict(config))
    weights = golden.weights
    if config.get("_remove_final_layer_norm"):
        weights = {k: v for k, v in weights.items() if ".decoder.final_layer_norm" not in k}
    sanitize = getattr(model, "sanitize", dict)  # phi and nemotron have none
    model.load_weights(list(sanitize(weights).items()))
    assert difference(whole(model, golden.tokens[0]), golden.logits[0]) > 5 * TOLERANCE


@pytest.mark.parametrize("name", ["opt", "falcon-40b", "persimmon-scaled", "minicpm-fatrelu"])
def test_tied_head_in_the_checkpoint(tmp_path, name):
    """A head beside a tied embedding is left out if equal, used if not, and may stand alone."""
    golden = Golden(OWN[name])
    embedding = next(k for k in golden.weights if "embed_tokens" in k or "word_embeddings" in k)
    table = golden.weights[embedding]

    def logits(path):
        directory = ModelDirectory(convert(golden.write(path / "hf"), path / "flash"))
        model = load_model(directory, PagingOptions(kept_share=0.0))
        return whole(model, golden.tokens[0]), dict(tree_flatten(model.parameters()))

    for kind in ("equal", "alone", "other"):
        (tmp_path / kind).mkdir()
    golden.weights["lm_head.weight"] = table + 0
    found, parameters = logits(tmp_path / "equal")
    assert "lm_head.weight" not in parameters
    assert difference(found, golden.logits[0]) <= TOLERANCE
    del golden.weights[embedding]
    assert difference(logits(tmp_path / "alone")[0], golden.logits[0]) <= TOLERANCE
    golden.weights |= {embedding: table, "lm_head.weight": 2 * table}
    found, parameters = logits(tmp_path / "other")
    assert "lm_head.weight" in parameters
    assert difference(found, 2 * golden.logits[0]) <= 2 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("opt", {"activation_function": "mish"}, "'mish'; expected one of relu, relu2"),
        ("opt", {"num_attention_heads": 5}, "32 is no multiple of num_attention_heads 5"),
        ("opt", {"ffn_dim": 40}, r"fc1\.weight: \(48, 32\), expected \(40, 32\)"),
        ("opt", {"enable_bias": False}, r"not expected: .*mlp\.fc1\.bias"),
        ("falcon-7b", {"activation": "mish"}, "'mish'; expected one of relu, relu2"),
        ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "is 3; expected 1 or 2"),
        ("falcon-40b", {"num_kv_heads": 3}, "multiple of num_kv_heads 3"),
        ("falcon-7b", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn', but .* has no factor"),
        ("falcon-7b", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope'; expected one"),
        (
            "falcon-llama3",
            {"rope_parameters": {"rope_type": "llama3"}},
            "no factor and no low_freq",
        ),
        ("falcon-7b", {"parallel_attn": False}, "missing: .*post_attention_layernorm"),
        ("persimmon", {"hidden_act": "mish"}, "'mish'; expected one of relu, relu2"),
        ("persimmon", {"qk_layernorm": False}, "not expected: .*q_layernorm"),
        ("persimmon", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'; expected"),
        ("persimmon-yarn", {"rope_scaling": YARN | {"attention_factor": 1.5}}, "expected neither"),
        ("persimmon-yarn", {"rope_scaling": YARN | {"truncate": False}}, "expected neither"),
        ("llama-relu", {"hidden_act": "mish"}, "'mish'; expected one of relu, relu2"),
        ("llama-relu", {"rope_scaling": YARN, "max_position_embeddings": None}, "no original_max"),
        (
            "phi-relu",
            {"rope_scaling": {"type": "linear"}},
            "'linear', but its config has no factor",
        ),
        ("phi-relu", {"qk_layernorm": True}, "qk_layernorm .* is not computed"),
        ("phi-relu", {"intermediate_size": 40}, r"expected \(40, 32\)"),
        ("bamboo", {"hidden_act": "silu"}, "'silu'; expected one of relu"),
        ("refinedweb-40b", {"n_head_kv": 3}, "multiple of num_kv_heads 3"),
        ("refinedweb-40b", {"n_head_kv": None}, "not expected: .*ln_attn"),
    ],
)
def test_config_that_does_not_fit(tmp_path, name, overrides, expected):
    with pytest.raises(ModelError, match=expected):
        HFCheckpoint(Golden(OWN[name]).write(tmp_path / "hf", **overrides))


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("opt", "activation_function"),
        ("falcon", "activation"),
        ("RefinedWeb", "activation"),
        ("persimmon", "hidden_act"),
        ("llama", "hidden_act"),
        ("phi", "hidden_act"),
    ],
)
def test_activation_is_checked_by_the_model_too(model_type, key):
    config = {"model_type": model_type, key: "mish"}
    with pytest.raises(ModelError, match=f"this {model_type} model is 'mish'; expected one of"):
        model_class, args = get_classes(config)
        model_class(args.from_dict(config))


def test_unknown_architecture():
    with pytest.raises(ValueError, match="nosuch not supported"):
        get_classes({"model_type": "nosuch"})
    for silent in ("llama", "mistral", "sparsellama"):
        assert get_classes({"model_type": silent})[0].__module__ == "mlx_lm.models.llama"


def test_window_reaches_no_further_back_than_it_says(tmp_path):
    """A window as long as the model's limit is none; one for some layers is theirs alone."""
    golden = Golden(OWN["mistral-relu"])

    def windows(**overrides):
        config = golden.config | overrides
        model_class, args = get_classes(config)
        model = model_class(args.from_dict(config))
        return [getattr(cache, "max_size", None) for cache in make_prompt_cache(model)]

    assert windows() == [12, 12]
    assert windows(sliding_window=None) == windows(sliding_window=64) == [None, None]
    layers = ["full_attention", "sliding_attention"]
    assert windows(layer_types=layers) == [None, 12]
    assert windows(hidden_act="silu") == [12, 12]  # mlx-lm's own has none


def test_more_tokens_than_positions(tmp_path):
    golden = Golden(OWN["opt"])
    model = utils.load_model(golden.write(tmp_path / "hf"), get_model_classes=get_classes)[0]
    limit = golden.config["max_position_embeddings"]
    assert mx.all(mx.isfinite(whole(model, [5] * limit)))
    with pytest.raises(ModelError, match=f"{limit + 1} tokens are more than the {limit}"):
        whole(model, [5] * (limit + 1))
    with pytest.raises(ModelError, match=f"{limit + 1} tokens are more than the {limit}"):
        list(generate_step(mx.array([5] * limit), model, max_tokens=3))


def test_alibi_and_a_rotating_cache(tmp_path):
    golden = Golden(OWN["falcon-rw"])
    model = utils.load_model(golden.write(tmp_path / "hf"), get_model_classes=get_classes)[0]
    prompt = mx.array(golden.tokens[:1])
    cache = [RotatingKVCache(max_size=40, keep=4) for _ in model.layers]
    assert difference(model(prompt, cache=cache)[0], golden.logits[0]) <= TOLERANCE
    cache = [RotatingKVCache(max_size=20, keep=4) for _ in model.layers]
    with pytest.raises(ModelError, match="its cache keeps 20"):
        model(prompt, cache=cache)


@pytest.mark.parametrize("model_type", sorted(DECODERS.keys() & TINY.keys()))
def test_quantised_kv_cache(tmp_path, model_type):
    # mlx-lm cannot quantise a cache that rotates.
    window = {"sliding_window": None} if model_type == "bamboo" else {}
    source = make_checkpoint(tmp_path / "hf", model_type, hidden_size=256, **window)
    model = utils.load_model(source, get_model_classes=get_classes)[0]
    prompt = mx.array([5, 17, 42, 7, 3])
    steps = generate_step(prompt, model, max_tokens=8, kv_bits=8, kv_group_size=64)
    expected = generate_step(prompt, model, max_tokens=8)
    for (_, found), (_, exact) in zip(steps, expected, strict=True):
        assert difference(found, exact) < 0.5

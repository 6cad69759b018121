"""Where each model family keeps its FFN, and what the FFN computes.

Knows: for a Hugging Face ``model_type``, the attribute of a layer that holds the FFN and the names
of its projections. Does not know: how rows are stored or paged. A family that is not in the table
is an error that lists the table: a guessed place would page the wrong matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import ModelError

from .activations import FUNCTIONS, NAMES, with_threshold
from .mixtures import ALIASES, MIXTURES

SILU = ("silu", "swish")
# Exact and tanh forms differ by less than 5e-4; of rare families either is taken for the other.
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
RELU2 = ("relu2",)
ZEROS = ("relu", "relu2", "fatrelu")  # 0 for every argument up to 0

# Config value -> function, in the families whose module in mlx-lm does what the config says.
FOLLOWED = {
    **dict.fromkeys(SILU, "silu"),
    **dict.fromkeys(GELU, "gelu_approx"),
    "gelu": "gelu",
    "relu": "relu",
}
# The same, in the families whose activation ``activation_override`` replaces where mlx-lm's module
# computes another one.
OVERRIDDEN = NAMES | {"fatrelu": "fatrelu"}
THRESHOLD = "hidden_act_param"  # key of the threshold of fatrelu


@dataclass(frozen=True)
class Ffn:
    """The FFN of one family: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` ungated.

    Args:
        module: attribute of a decoder layer that holds the FFN module, dots allowed.
        up, down: names of the projections inside that module.
        gate: name of the gate projection; None for an ungated FFN.
        fused: name of one projection that holds gate rows, then up rows; replaces gate and up.
        activation: what the module computes: a name in ``models.activations.FUNCTIONS``, or xielu
            (which has parameters of its own, in the module's ``act_fn``).
        threshold: where fatrelu begins to let its argument through; 0 or more.
        up_activation: what is applied to up's output before the product; None for nothing, relu
            for dReLU.
        config_activations: values of the config's activation key under which that is right.
        activation_keys: keys of the config that may name the activation; absent or null is fine.
        follows_config: the module computes the activation that the config names.
        followed: config value -> function, if so.
        built_in: what mlx-lm's module computes, whatever the config says, in a family where
            ``activation_override`` puts in another one if need be; None where that is not done.
        norm: name of a norm inside the module, applied to x first.
        experts: key of the config that tells a mixture, and its largest value in a dense model.
    """

    module: str = "mlp"
    up: str | None = "up_proj"
    down: str = "down_proj"
    gate: str | None = "gate_proj"
    fused: str | None = None
    activation: str = "silu"
    config_activations: tuple[str, ...] = SILU
    activation_keys: tuple[str, ...] = (
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "activation_fn_name",
    )
    follows_config: bool = False
    followed: dict[str, str] = field(default_factory=lambda: FOLLOWED, compare=False)
    threshold: float = 0.0
    up_activation: str | None = None
    built_in: str | None = None
    norm: str | None = None
    experts: tuple[str, int] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of a row's parts, in the order in which they stand in a row."""
        return ("gate", "up", "down") if self.gate or self.fused else ("up", "down")

    @property
    def overridden(self) -> bool:
        """Whether ``activation_override`` replaces mlx-lm's module."""
        return self.built_in is not None and self.built_in != self.activation


def _fused(name: str = "gate_up_proj", **other: Any) -> Ffn:
    return Ffn(gate=None, up=None, fused=name, **other)


def _geglu(activation: str = "gelu_approx", **other: Any) -> Ffn:
    return Ffn(activation=activation, config_activations=GELU, **other)


def _ungated(up: str, down: str, activation: str, config_activations: tuple[str, ...]) -> Ffn:
    return Ffn("mlp", up, down, None, None, activation, config_activations)


def _overridable(**other: Any) -> Ffn:
    """An FFN with the config's activation: mlx-lm's module, or that of ``activation_override``."""
    return Ffn(**{"follows_config": True, "followed": OVERRIDDEN, "built_in": "silu"} | other)


def _gelu(up: str, down: str, activation: str, built_in: str) -> Ffn:
    """An ungated FFN, GELU unless the config says otherwise.

    Args:
        activation: the form that transformers takes where the config says nothing.
        built_in: mlx-lm's.
    """
    return _overridable(up=up, down=down, gate=None, activation=activation, built_in=built_in)


def _own(up: str, down: str, activation: str, *keys: str) -> Ffn:
    """An ungated FFN of a decoder in ``models``, all of which do what the config says."""
    return Ffn(
        "mlp",
        up,
        down,
        gate=None,
        activation=activation,
        activation_keys=keys,
        follows_config=True,
        followed=NAMES,
    )


FAMILIES: dict[str, Ffn] = {
    # SwiGLU under llama's names, or what the config says.
    "llama": _overridable(),
    "bypass_llama": _overridable(),
    "minicpm": _overridable(),
    "mistral": _overridable(),
    "sparsellama": _overridable(),
    # The same, relu on gate and up.
    "bamboo": _overridable(activation="relu", up_activation="relu", followed={"relu": "relu"}),
    # SwiGLU under llama's names. IQuest-Coder and XVERSE run as llama in mlx-lm, as Mistral does.
    "iquestcoder": Ffn(),
    "xverse": Ffn(),
    "baichuan_m1": Ffn(),
    "cohere": Ffn(),
    "cohere2": Ffn(),
    "ernie4_5": Ffn(),
    "exaone4": Ffn(),
    "granite": Ffn(),
    "helium": Ffn(),
    "hunyuan_v1_dense": Ffn(),
    "internlm3": Ffn(),
    "mimo": Ffn(),
    "minicpm3": Ffn(),
    "ministral3": Ffn(),
    "muse_glimmer": Ffn(),
    "olmo2": Ffn(),
    "olmo3": Ffn(),
    "olmo_hybrid": Ffn(),
    "plamo": Ffn(),
    "qwen2": Ffn(),
    "qwen3": Ffn(),
    "seed_oss": Ffn(),
    "smollm3": Ffn(),
    "stablelm": Ffn(),
    "telechat3": Ffn(),
    "youtu_llm": Ffn(),
    # The same; the stack of layers runs more than once per token.
    "iquestloopcoder": Ffn(),
    "nanbeige": Ffn(),
    # The same; the last layers (model.kv_reuse_layers) share keys and values.
    "afm7": Ffn(),
    # The same names, other activations, or as the config says.
    # transformers takes gemma's "gelu" for the tanh form, which the weights were made with.
    "gemma": _overridable(
        activation="gelu_approx", built_in="gelu", followed=OVERRIDDEN | {"gelu": "gelu_approx"}
    ),
    "gemma2": _overridable(activation="gelu_approx", built_in="gelu_approx"),
    "gemma3_text": _overridable(activation="gelu_approx", built_in="gelu_approx"),
    "gemma4_text": _geglu(experts=("enable_moe_block", 0)),
    "spark2_5": Ffn(activation="gelu", config_activations=("gelu",)),
    "gear": _geglu(follows_config=True),
    "nemotron-nas": Ffn(follows_config=True),
    # SwiGLU elsewhere in the layer, or under other names.
    "falcon_h1": Ffn("feed_forward"),
    "llama4_text": Ffn("feed_forward"),
    "lille-130m": Ffn("feed_forward", norm="norm"),
    "exaone": Ffn(gate="c_fc_0", up="c_fc_1", down="c_proj"),
    "internlm2": Ffn("feed_forward", gate="w1", up="w3", down="w2"),
    "lfm2": Ffn("feed_forward", gate="w1", up="w3", down="w2"),
    "qwen": Ffn(gate="w2", up="w1", down="c_proj"),
    "talkie": Ffn(gate="mlp_gate", up="mlp_linear", down="mlp_resid"),
    "recurrent_gemma": _geglu(module="mlp_block"),
    # Dense members of families that also have mixtures.
    "granitemoehybrid": Ffn(experts=("num_local_experts", 0)),
    "hunyuan": Ffn(experts=("num_experts", 1)),
    "jamba": Ffn("feed_forward", experts=("num_experts", 1)),
    # Gate and up in one matrix.
    "glm": _fused(),
    "glm4": _fused(),
    "phi3": _fused(),
    "plamo2": _fused(),
    "plamo3": _fused(),
    "openelm": _fused("proj_1", module="ffn", down="proj_2"),
    # No gate.
    "apertus": _ungated("up_proj", "down_proj", "xielu", ("xielu",)),
    "gpt2": _gelu("c_fc", "c_proj", "gelu_approx", built_in="gelu_approx"),
    "gpt_bigcode": _gelu("c_fc", "c_proj", "gelu_approx", built_in="gelu"),
    "gpt_neox": _gelu("dense_h_to_4h", "dense_4h_to_h", "gelu", built_in="gelu_approx"),
    "gptj": _gelu("fc_in", "fc_out", "gelu_approx", built_in="gelu_approx"),
    "nanochat": _ungated("c_fc", "c_proj", "relu2", RELU2),
    "nemotron": _ungated("up_proj", "down_proj", "relu2", RELU2),
    "phi": _gelu("fc1", "fc2", "gelu_approx", built_in="gelu_approx"),
    "starcoder2": _gelu("c_fc", "c_proj", "gelu_approx", built_in="gelu"),
    # No gate; decoders of this package.
    **dict.fromkeys(
        ("falcon", "RefinedWeb", "RefinedWebModel"),
        _own("dense_h_to_4h", "dense_4h_to_h", "gelu", "activation", "hidden_act"),
    ),
    "opt": _own("fc1", "fc2", "relu", "activation_function"),
    "persimmon": _own("dense_h_to_4h", "dense_4h_to_h", "relu2", "hidden_act"),
}


def find(config: dict[str, Any]) -> Ffn:
    """The FFN entry of a config.

    Raises:
        ModelError: the family is unknown or the model a mixture, or the config names an activation
            that mlx-lm's module would silently not compute.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not a family whose FFN this version can page; "
            f"known: {', '.join(sorted(FAMILIES))}; "
            f"of mixtures of experts: {', '.join(sorted({*MIXTURES, *ALIASES}))}"
        )
    ffn = FAMILIES[model_type]
    # Some configs of text models keep the nesting of the multimodal model they came from.
    config = config | (config.get("text_config") or {})
    if ffn.experts and int(config.get(ffn.experts[0]) or 0) > ffn.experts[1]:
        key = ffn.experts[0]
        raise ModelError(
            f"this {model_type} model is a mixture of experts ({key} is {config[key]!r}); "
            f"only dense models can be paged"
        )
    named = {k: config[k] for k in ffn.activation_keys if config.get(k) is not None}
    for key, value in named.items():
        ffn = _with_activation(ffn, model_type, key, value)
    own = ffn.built_in or ffn.followed is NAMES
    if own and len({ffn.followed[value] for value in named.values()}) > 1:
        said = " and ".join(f"{key} {value!r}" for key, value in named.items())
        raise ModelError(
            f"this {model_type} model names two activations, {said}; "
            "take the one that it was not trained with out of its config.json"
        )
    if ffn.activation == "fatrelu":
        return replace(ffn, threshold=_threshold(config, model_type))
    return ffn


def _threshold(config: dict[str, Any], model_type: str) -> float:
    """The threshold of fatrelu; ModelError if it is missing, no number or negative."""
    value = config.get(THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ModelError(
            f"{THRESHOLD} of this {model_type} model, the threshold of its fatrelu, is {value!r}; "
            "expected a number, 0 or more"
        )
    return float(value)


def _with_activation(ffn: Ffn, model_type: str, key: str, value: Any) -> Ffn:
    """``ffn`` under the activation that a config names; raises ModelError if it is ignored."""
    if ffn.follows_config:
        if isinstance(value, str) and value in ffn.followed:
            return replace(ffn, activation=ffn.followed[value])
        known = ", ".join(ffn.followed)
        raise ModelError(f"{key} of this {model_type} model is {value!r}; expected one of {known}")
    if value in ffn.config_activations:
        return ffn
    raise ModelError(
        f"{key} of this {model_type} model is {value!r}, but mlx-lm computes {ffn.activation} for "
        f"this family whatever the config says, so its output would be wrong; expected "
        f"{' or '.join(ffn.config_activations)}"
    )


def gate_function(ffn: Ffn) -> Callable[[mx.array], mx.array]:
    """What is applied to the gate's output, or to up's of an ungated FFN.

    Raises:
        ModelError: it is no function of that output alone, or its threshold is negative.
    """
    return with_threshold(ffn.activation, ffn.threshold)


def up_function(ffn: Ffn) -> Callable[[mx.array], mx.array]:
    """What is applied to up's output before a gated FFN's product: mostly nothing."""
    return FUNCTIONS[ffn.up_activation] if ffn.up_activation else lambda x: x


def has_zeros(ffn: Ffn) -> bool:
    """Whether a neuron's gate (up if ungated) at or below 0 makes its activation exactly 0."""
    return ffn.activation in ZEROS


def rowwise(ffn: Ffn) -> bool:
    """Whether quantising anew gives every row scales of its own, so that single rows can be read.

    Elsewhere every row is needed for every token, and mlx-lm's own grouping is kept.
    """
    return has_zeros(ffn) and not ffn.fused


def projections(ffn: Ffn) -> dict[str, str]:
    """Part -> name of the projection that holds it; the gate and up of a fused one share a name."""
    if ffn.fused:
        return {"gate": ffn.fused, "up": ffn.fused, "down": ffn.down}
    return {part: getattr(ffn, part) for part in ffn.parts}


def weight_shapes(ffn: Ffn, rows: int, d_model: int) -> dict[str, tuple[int, int]]:
    """Name of each projection -> shape of its weight, for an FFN of ``rows`` neurons."""
    tall = (2 * rows if ffn.fused else rows, d_model)
    return {
        name: (d_model, rows) if part == "down" else tall for part, name in projections(ffn).items()
    }


def modules(model: nn.Module, ffn: Ffn) -> list[tuple[str, Any]]:
    """(dotted path in the model's parameter tree, FFN module) of every decoder layer, in order.

    Raises:
        ModelError: a layer has no such module, or the module lacks a projection.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for index, layer in enumerate(model.layers):
        module = reduce(lambda m, name: getattr(m, name, None), ffn.module.split("."), layer)
        if id(module) not in paths:
            raise ModelError(
                f"layer {index} ({type(layer).__name__}) has no FFN module {ffn.module!r}; "
                f"it has: {', '.join(layer.children()) or 'nothing'}"
            )
        _check_projections(paths[id(module)], module, ffn)
        found.append((paths[id(module)], module))
    return found


def _check_projections(path: str, module: nn.Module, ffn: Ffn) -> None:
    """Raise ModelError unless every projection of the table is a linear layer of the module."""
    for part, name in projections(ffn).items():
        layer = getattr(module, name, None)
        if not isinstance(layer, nn.Linear | nn.QuantizedLinear):
            kind = "missing" if layer is None else f"a {type(layer).__name__}"
            raise ModelError(
                f"{path}.{name}, the {part} projection of a layer's FFN, is {kind}; expected a "
                f"Linear (the module has: {', '.join(module.children()) or 'nothing'})"
            )

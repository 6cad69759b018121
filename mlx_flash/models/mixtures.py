"""Where each family of mixtures keeps its experts, and what scores them.

Knows: for a Hugging Face ``model_type``, the path from a decoder layer to mlx-lm's ``SwitchGLU`` or
``SwitchMLP``, the path to the router, and the keys of the config that count experts. Does not know:
how experts are stored or paged. The table is held against the model: a switch module that it does
not name, or names wrongly, is an error, for it would stay in memory or page the wrong matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)
from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

from mlx_flash.errors import ModelError

SCORINGS: dict[str, Callable[[mx.array], mx.array]] = {
    "softmax": lambda x: mx.softmax(x, axis=-1, precise=True),
    "sigmoid": mx.sigmoid,
    "sqrtsoftplus": lambda x: mx.sqrt(nn.softplus(x)),
}
GATED = ("gate_proj", "up_proj", "down_proj")
UNGATED = ("fc1", "fc2")


@dataclass(frozen=True)
class Router:
    """What scores the experts of a layer: ``scoring(scale * hidden @ weight.T) + correction``.

    Args:
        module: dotted path from a decoder layer to the module that has ``weight``: a linear layer,
            or a gate with a matrix of its own.
        correction: dotted path from a decoder layer to what is added to the scores before the best
            are taken; None for nothing. Absent from the layer is fine, some configs leave it out.
        scoring: what is applied to the product first, which matters under a correction only: a
            name in ``SCORINGS``.
        scale: dotted path from a decoder layer to a vector that the hidden state is multiplied by.
    """

    module: str
    correction: str | None = None
    scoring: str = "sigmoid"
    scale: str | None = None


@dataclass(frozen=True)
class Mixture:
    """The experts of one family: mlx-lm's switch module, in the layers that have one.

    Args:
        module: dotted path from a decoder layer to the switch module.
        router: what scores experts; None where its choice cannot be predicted.
        experts: keys of the config that may give the number of experts; the first present counts.
        top_k: the same for the number of experts per token.
        gated: the module is a ``SwitchGLU``, not a ``SwitchMLP``.
        dense: key of the config that tells a mixture, and its largest value in a dense model; None
            in a family without dense members.
    """

    module: str = "mlp.switch_mlp"
    router: Router | None = Router("mlp.gate")
    experts: tuple[str, ...] = ("num_experts",)
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    gated: bool = True
    dense: tuple[str, int] | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the switch module's projections, in the order in which it holds them."""
        return GATED if self.gated else UNGATED

    @property
    def switch(self) -> type[nn.Module]:
        """The class of the switch module."""
        return SwitchGLU if self.gated else SwitchMLP


def _corrected(
    module: str, scoring: str = "sigmoid", name: str = "e_score_correction_bias"
) -> Router:
    """A router whose own module holds the correction."""
    return Router(module, f"{module}.{name}", scoring)


def _sparse_block(router: str, correction: str | None = None, **other: Any) -> Mixture:
    """Mixtral's names; a correction lies in the block."""
    block = "block_sparse_moe"
    scores = Router(f"{block}.{router}", correction and f"{block}.{correction}")
    return Mixture(f"{block}.switch_mlp", scores, ("num_local_experts",), **other)


def _deepseek(**other: Any) -> Mixture:
    fields = {"router": _corrected("mlp.gate"), "experts": ("n_routed_experts",)}
    return Mixture(**fields | other)


MIXTURES: dict[str, Mixture] = {
    # The best of a linear layer's products.
    **dict.fromkeys(("mellum", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"), Mixture()),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_vl_moe"), Mixture()),
    "ernie4_5_moe": Mixture(
        router=Router("mlp.gate", "mlp.e_score_correction_bias", "softmax"),
        experts=("moe_num_experts",),
        top_k=("moe_k",),
    ),
    "hunyuan": Mixture(router=Router("mlp.gate.wg"), top_k=("moe_topk",), dense=("num_experts", 1)),
    "jamba": Mixture(
        "feed_forward.switch_mlp", Router("feed_forward.router"), dense=("num_experts", 1)
    ),
    "llama4": Mixture(
        "feed_forward.experts", Router("feed_forward.router"), ("num_local_experts",)
    ),
    "gpt_oss": Mixture("mlp.experts", Router("mlp.router"), ("num_local_experts",)),
    **dict.fromkeys(("mixtral", "phimoe"), _sparse_block("gate")),
    "granitemoe": _sparse_block("router.layer"),
    "granitemoehybrid": _sparse_block("router.layer", dense=("num_local_experts", 0)),
    **dict.fromkeys(
        ("gemma4", "gemma4_text"),
        Mixture(
            "experts.switch_glu",
            Router("router.proj", scale="router.scale"),
            top_k=("top_k_experts",),
            dense=("enable_moe_block", 0),
        ),
    ),
    **dict.fromkeys(("deepseek", "deepseek_v2", "mistral4"), _deepseek(router=Router("mlp.gate"))),
    "mistral3": _deepseek(router=Router("mlp.gate"), dense=("n_routed_experts", 0)),
    # The best of a function of it, corrected.
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_k25", "kimi_vl"), _deepseek()),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "solar_open"), _deepseek()),
    "mimo_v2_flash": _deepseek(),
    "dots1": _deepseek(module="mlp.experts"),
    "deepseek_v41": _deepseek(
        module="mlp.experts.switch_mlp", router=_corrected("mlp.gate", "sqrtsoftplus")
    ),
    "exaone_moe": Mixture(router=_corrected("mlp.gate")),
    "muse_spark": Mixture("mlp.experts", _corrected("mlp.gate"), ("num_local_experts",)),
    "bailing_moe_v3": Mixture(router=_corrected("mlp.gate", name="expert_bias")),
    **dict.fromkeys(
        ("bailing_hybrid", "bailing_moe", "bailing_moe_linear"),
        Mixture(router=Router("mlp.gate.gate_proj", "mlp.gate.expert_bias")),
    ),
    "Klear": Mixture("mlp.experts", Router("mlp.gate", "mlp.expert_bias")),
    "afmoe": Mixture("mlp.experts", Router("mlp.router.gate", "mlp.expert_bias")),
    **dict.fromkeys(
        ("kimi_k3", "kimi_linear"),
        Mixture(
            router=Router("mlp.gate", "mlp.e_score_correction_bias"),
            top_k=("num_experts_per_token",),
        ),
    ),
    "laguna": Mixture(router=Router("mlp.gate.proj", "mlp.gate.e_score_correction_bias")),
    "lfm2_moe": Mixture(
        "feed_forward.switch_mlp", Router("feed_forward.gate", "feed_forward.expert_bias")
    ),
    **dict.fromkeys(("minimax", "minimax_m3_vl"), _sparse_block("gate", "e_score_correction_bias")),
    "step3p5": Mixture(
        router=Router("mlp.gate.gate", "mlp.gate.router_bias"),
        experts=("moe_num_experts",),
        top_k=("moe_top_k",),
    ),
    # The same; scores past the last expert are of "zero experts", which hand on what they get.
    **dict.fromkeys(
        ("longcat_flash", "longcat_flash_ngram"),
        _deepseek(
            router=Router("mlp.router.classifier", "mlp.router.e_score_correction_bias", "softmax"),
            top_k=("moe_topk",),
        ),
    ),
    # No gate.
    "nemotron_h": _deepseek(
        module="mixer.switch_mlp",
        router=_corrected("mixer.gate"),
        gated=False,
        dense=("n_routed_experts", 0),
    ),
    "phixtral": Mixture("moe.switch_mlp", Router("moe.gate"), ("num_local_experts",), gated=False),
}

# model_type -> entry, of those that mlx-lm runs as another one.
ALIASES: dict[str, str] = {
    alias: name for alias, name in MODEL_REMAPPING.items() if name in MIXTURES
}


def find_mixture(config: dict[str, Any]) -> Mixture | None:
    """The mixture entry of a config; None for a dense model, and for families not in the table."""
    mixture = MIXTURES.get(_name(config))
    if mixture is None or mixture.dense is None:
        return mixture
    key, largest = mixture.dense
    return mixture if _largest(_nested(config).get(key)) > largest else None


def _name(config: dict[str, Any]) -> str:
    """The key of a config in the table, if it has one: what mlx-lm runs the model as."""
    model_type = config.get("model_type") or ""
    architectures = config.get("architectures") or ()
    if isinstance(architectures, str):
        architectures = (architectures,)
    for architecture in architectures:
        if (model_type, architecture) in MODEL_ARCHITECTURE_REMAPPING:
            return MODEL_ARCHITECTURE_REMAPPING[model_type, architecture]
    return ALIASES.get(model_type, model_type)


def expert_counts(config: dict[str, Any], mixture: Mixture) -> tuple[int, int]:
    """(experts of a layer, experts per token), from the config.

    Raises:
        ModelError: the config lacks one, or it is no number that a mixture can have.
    """
    experts = _count(config, mixture.experts, "experts")
    top_k = _count(config, mixture.top_k, "experts per token")
    if top_k > experts:
        raise ModelError(
            f"this {config.get('model_type')} model takes {top_k} experts per token, of {experts}"
        )
    return experts, top_k


def _count(config: dict[str, Any], keys: tuple[str, ...], what: str) -> int:
    nested = _nested(config)
    for key in keys:
        value = nested.get(key)
        if isinstance(value, list) and value:  # one entry per layer
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise ModelError(
                f"{key} of this {config.get('model_type')} model, its number of {what}, is "
                f"{value!r}; expected a number, 1 or more"
            )
    raise ModelError(
        f"the config of this {config.get('model_type')} model lacks its number of {what}: "
        f"{' or '.join(keys)}"
    )


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what multimodal ones keep about their text model."""
    return config | (config.get("text_config") or {})


def _largest(value: Any) -> int:
    return (
        max((int(v or 0) for v in value), default=0) if isinstance(value, list) else int(value or 0)
    )


def modules(model: nn.Module, mixture: Mixture) -> list[tuple[int, str, Any]]:
    """(decoder layer, dotted path in the parameter tree, switch module), in order.

    Layers without a switch module, such as the first ones of DeepSeek, are left out.

    Raises:
        ModelError: what the table names is no such module, or lacks a projection, or the model has
            a switch module that the table does not name, or none at all.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for index, layer in enumerate(model.layers):
        module = _get(layer, mixture.module)
        if module is None:
            continue
        if type(module) is not mixture.switch or id(module) not in paths:
            raise ModelError(
                f"{mixture.module} of layer {index} is a {type(module).__name__}; "
                f"expected a {mixture.switch.__name__}"
            )
        _check_projections(paths[id(module)], module, mixture)
        found.append((index, paths[id(module)], module))
    known = {path for _, path, _ in found}
    others = [
        path
        for path, module in model.named_modules()
        if isinstance(module, SwitchGLU | SwitchMLP) and path not in known
    ]
    if others:
        raise ModelError(
            f"experts lie where the table has none, at {', '.join(sorted(others))}; "
            f"expected them at {mixture.module} of decoder layers"
        )
    if not found:
        raise ModelError(
            f"no decoder layer has experts at {mixture.module}; "
            f"they are: {', '.join(sorted({type(layer).__name__ for layer in model.layers}))}"
        )
    return found


def _get(layer: nn.Module, path: str) -> Any:
    """What a dotted path leads to; None where it ends early."""
    return reduce(lambda m, name: getattr(m, name, None), path.split("."), layer)


def _check_projections(path: str, module: nn.Module, mixture: Mixture) -> None:
    """Raise ModelError unless the projections are switch layers with one number of experts."""
    counts = {}
    for name in mixture.projections:
        layer = getattr(module, name, None)
        if not isinstance(layer, SwitchLinear | QuantizedSwitchLinear):
            kind = "missing" if layer is None else f"a {type(layer).__name__}"
            raise ModelError(f"{path}.{name} is {kind}; expected a SwitchLinear")
        counts[name] = layer.num_experts
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} of {count}" for name, count in counts.items())
        raise ModelError(f"the projections of {path} hold different numbers of experts: {said}")


def counts_of(found: list[tuple[int, str, Any]], mixture: Mixture) -> dict[str, int]:
    """Dotted path of each switch module that ``modules`` found -> how many experts it holds."""
    return {path: getattr(m, mixture.projections[0]).num_experts for _, path, m in found}


def check_counts(config: dict[str, Any], mixture: Mixture, counts: dict[str, int]) -> None:
    """Hold the config's number of experts against those of the switch modules.

    Args:
        counts: what ``counts_of`` gives.

    Raises:
        ModelError: they differ; lists the modules.
    """
    experts, _ = expert_counts(config, mixture)
    wrong = [f"{path} has {count}" for path, count in counts.items() if count != experts]
    if wrong:
        raise ModelError(
            f"the config of this {config.get('model_type')} model says {experts} experts, but "
            f"{', '.join(wrong)}"
        )


def router_of(layer: nn.Module, mixture: Mixture) -> Callable[[mx.array], mx.array] | None:
    """What scores a layer's experts: hidden state in, scores out, of which the largest are chosen.

    For prefetching, before the layer runs: what a family does besides, such as choosing groups
    first, is left out. None where the table has no router or the layer none.
    """
    router = mixture.router
    module = _get(layer, router.module) if router else None
    if router is None or module is None:
        return None
    linear = isinstance(module, nn.Linear | nn.QuantizedLinear)
    correction = _get(layer, router.correction) if router.correction else None
    scale = _get(layer, router.scale) if router.scale else None

    def scores(hidden: mx.array) -> mx.array:
        hidden = hidden if scale is None else hidden * scale
        logits = (module(hidden) if linear else hidden @ module.weight.T).astype(mx.float32)
        return logits if correction is None else SCORINGS[router.scoring](logits) + correction

    return scores

"""What the decoders of this package share: rotary positions, positions in a batch, the head.

Knows: how configs and checkpoints of transformers 4 and 5 say these things. Does not know: any one
family. Sources: ``modeling_rope_utils`` and ``PreTrainedModel.tie_weights`` of transformers 5.23.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.rope_utils import initialize_rope

from mlx_flash.errors import ModelError

ROPE_THETA = 10000.0
ROTARY_SHARE = 0.5  # of a head, where a family has partial rotation and the config no share
# Kind -> settings that it needs. Those left out depend on the length of the sequence, and MLX and
# transformers take another length: of what has come so far the one, of the whole the other.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def rope_settings(
    rope_parameters: Mapping[str, Any] | None,
    rope_scaling: Mapping[str, Any] | None,
    **loose: float | None,
) -> dict[str, Any]:
    """The rotary settings of a config, whichever way it writes them.

    Args:
        rope_parameters: the object of transformers 5, which may hold all of them.
        rope_scaling: the object of transformers 4; goes before ``rope_parameters``.
        loose: settings that stand at the top level of a config of transformers 4.
    """
    settings = dict(rope_scaling or rope_parameters or {})
    for key, value in loose.items():
        if value is not None:
            settings.setdefault(key, value)
    settings.setdefault("rope_theta", ROPE_THETA)
    settings.setdefault("rope_type", settings.get("type", "default"))
    return settings


def rope_scaling(settings: Mapping[str, Any], max_positions: int | None) -> dict[str, Any] | None:
    """What mlx-lm's ``initialize_rope`` takes for the settings, so that it does as transformers.

    Args:
        max_positions: the length that the model was made for, where the settings hold none.

    Raises:
        ModelError: the kind is unknown, lacks a setting, or has one that MLX would ignore.
    """
    kind = settings["rope_type"]
    if kind not in ROPE_TYPES:
        raise ModelError(f"rope_type is {kind!r}; expected one of {', '.join(ROPE_TYPES)}")
    if missing := [key for key in ROPE_TYPES[kind] if settings.get(key) is None]:
        raise ModelError(f"rope_type is {kind!r}, but the config has no {' and no '.join(missing)}")
    if kind == "default":
        return None
    scaling = {"type": kind} | {key: float(settings[key]) for key in ROPE_TYPES[kind]}
    if kind == "linear":
        return scaling
    original = settings.get("original_max_position_embeddings") or max_positions
    if original is None:
        raise ModelError(
            f"rope_type is {kind!r}, but the config has no original_max_position_embeddings"
        )
    return scaling | {"original_max_position_embeddings": original} | _yarn(kind, settings)


def _yarn(kind: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """The optional settings of yarn."""
    if kind != "yarn":
        return {}
    if settings.get("attention_factor") is not None or settings.get("truncate") is False:
        raise ModelError(
            "rope_type is 'yarn' with attention_factor or without truncate, which MLX does not "
            "compute; expected neither"
        )
    keys = ["beta_fast", "beta_slow"]
    if settings.get("mscale") and settings.get("mscale_all_dim"):  # one alone does nothing
        keys += ["mscale", "mscale_all_dim"]
    return {key: float(settings[key]) for key in keys if settings.get(key)}


def make_rope(dims: int, settings: Mapping[str, Any], max_positions: int | None) -> nn.Module:
    """Rotary embedding of the first ``dims`` of a head; ModelError as from ``rope_scaling``."""
    scaling = rope_scaling(settings, max_positions)
    return initialize_rope(dims, float(settings["rope_theta"]), False, scaling, max_positions)


class TransformersArgs:
    """Mixed into an arguments class of mlx-lm: configs are read as transformers reads them.

    mlx-lm has other defaults for some keys and, in older models, does not know rope_parameters.
    """

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Any:
        params = {"tie_word_embeddings": False} | dict(params)
        settings = rope_settings(
            params.get("rope_parameters"),
            params.get("rope_scaling"),
            rope_theta=params.get("rope_theta"),
            partial_rotary_factor=params.get("partial_rotary_factor") or ROTARY_SHARE,
        )
        scaling = rope_scaling(settings, params.get("max_position_embeddings"))
        if scaling and "rope_scaling" not in inspect.signature(cls).parameters:
            raise ModelError(
                f"rope_type is {scaling['type']!r}, but mlx-lm's {params.get('model_type')} "
                "ignores it; expected default"
            )
        lifted = {key: settings[key] for key in ("rope_theta", "partial_rotary_factor")}
        return super().from_dict(params | lifted | {"rope_scaling": scaling})


def run_layers(
    layers: Sequence[nn.Module],
    h: mx.array,
    cache: Sequence[Any] | None,
    make_mask: Callable[[mx.array, Any], Any] = create_attention_mask,
) -> mx.array:
    """A hidden state [batch, length, width] taken through layers that share one mask.

    Args:
        cache: one for each layer; None for none.
        make_mask: the mask for a hidden state and the first layer's cache.
    """
    caches = cache or [None] * len(layers)
    mask = make_mask(h, caches[0])
    for layer, its_cache in zip(layers, caches, strict=True):
        h = layer(h, mask, its_cache)
    return h


def offset_of(cache: Any) -> int | mx.array:
    """How many tokens a layer's cache holds, one number or one for each sequence of a batch."""
    return 0 if cache is None else cache.offset


def largest(offset: int | mx.array) -> int:
    """The largest of the offsets of a batch."""
    return offset if isinstance(offset, int) else int(mx.max(offset).item())


def positions(offset: int | mx.array, start: int, stop: int) -> mx.array:
    """Tokens ``start`` to ``stop`` counted from an offset: positions [length] or [batch, length].

    Tokens before a sequence's first one, which pad it on the left, get position -1.
    """
    steps = mx.arange(start, stop)
    return mx.maximum(steps + (offset if isinstance(offset, int) else offset[:, None]), -1)


def settle_head(model: nn.Module, weights: dict[str, mx.array], embedding: str) -> None:
    """Make ``model.lm_head`` and ``weights`` agree on whether the head is tied.

    As transformers does it: a checkpoint of a tied model that holds a head all the same is tied
    only where that head equals the embedding. Both are read for that.

    Args:
        embedding: name of the embedding's weight.
    """
    if "lm_head" in model or "lm_head.weight" not in weights:
        return
    head = weights.pop("lm_head.weight")
    if embedding not in weights:
        weights[embedding] = head
    elif not mx.array_equal(head, weights[embedding]).item():
        vocab, width = head.shape
        model.lm_head = nn.Linear(width, vocab, bias=False)
        weights["lm_head.weight"] = head


class TiedHeadModel(nn.Module):
    """A stack of decoder layers and a head, which may be the stack's own token embedding.

    Attributes:
        STACK: name of the attribute that holds the stack, as in the weights' names.
        EMBEDDING: dotted path from the stack to its token embedding.

    Args:
        args: with ``model_type``, ``vocab_size`` and ``tie_word_embeddings``.
        stack: the layers between token numbers and the last hidden state.
        width: of what the head takes.
    """

    STACK: ClassVar[str]
    EMBEDDING: ClassVar[str]

    def __init__(self, args: Any, stack: nn.Module, width: int) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self[self.STACK] = stack
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(width, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Logits [batch, length, vocabulary] of token numbers [batch, length]."""
        h = self[self.STACK](inputs, cache)
        if "lm_head" in self:
            return self.lm_head(h)
        return reduce(getattr, self.EMBEDDING.split("."), self[self.STACK]).as_linear(h)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights under this module's names; those of a bare stack lack its prefix."""
        top_level = (f"{self.STACK}.", "lm_head.")
        named = {
            name if name.startswith(top_level) else f"{self.STACK}.{name}": weight
            for name, weight in weights.items()
            if not name.endswith("inv_freq")
        }
        settle_head(self, named, f"{self.STACK}.{self.EMBEDDING}.weight")
        return named

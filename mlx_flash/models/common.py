"""What the decoders of this package share: rotary positions, positions in a batch, tied heads.

Knows: how configs and checkpoints of transformers 4 and 5 say these things. Does not know: any one
family. Sources: ``modeling_rope_utils`` and ``PreTrainedModel.tie_weights`` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError

ROPE_TYPES = ("default", "linear")
ROPE_THETA = 10000.0


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


def make_rope(dims: int, settings: Mapping[str, Any]) -> nn.RoPE:
    """Rotary embedding of the first ``dims`` of a head; ModelError for an unknown kind."""
    kind = settings["rope_type"]
    if kind not in ROPE_TYPES:
        raise ModelError(f"rope_type is {kind!r}; expected one of {', '.join(ROPE_TYPES)}")
    scale = 1.0 / float(settings["factor"]) if kind == "linear" else 1.0
    return nn.RoPE(dims, traditional=False, base=float(settings["rope_theta"]), scale=scale)


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

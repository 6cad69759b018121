"""How many tokens a config's model was made for.

Families spell the limit in many ways, and rope scaling stretches it: Qwen's cards put a yarn of
factor 4 beside a ``max_position_embeddings`` that stays at the length before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# The first that a config has counts.
LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "max_context_length",
    "model_max_length",
)
INNER = ("text_config", "llm_config", "language_config")
ROPE = ("rope_parameters", "rope_scaling")
ORIGINAL = "original_max_position_embeddings"


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that a config's model was made for; None where it does not say.

    Rope scaling by a factor stretches what it scales: the original length if it is given, else the
    limit itself. A limit that is stretched already is taken as it is.
    """
    inner = (config.get(key) for key in INNER)
    for text in [config, *(c for c in inner if isinstance(c, dict))]:
        stated = next((n for key in LIMITS if (n := _length(text.get(key)))), 0)
        if found := max([stated, *(_stretched(rope, text, stated) for rope in _ropes(text))]):
            return found
    return None


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Objects with rope settings, in either spelling, those of kinds of layers one by one."""
    for key in ROPE:
        if isinstance(found := config.get(key), dict):
            yield found
            yield from (inner for inner in found.values() if isinstance(inner, dict))


def _stretched(rope: Mapping[str, Any], config: Mapping[str, Any], stated: int) -> int:
    """The length that a scaling gives; 0 where it gives none."""
    factor = rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        return 0
    if not (factor >= 1 and math.isfinite(factor)):
        return 0
    original = _length(rope.get(ORIGINAL)) or _length(config.get(ORIGINAL)) or stated
    return int(factor * original)


def _length(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

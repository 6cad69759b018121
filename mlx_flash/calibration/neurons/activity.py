"""Activation statistics: which rows were active at which token, counted with numpy.

Arrays are bool [tokens, rows], tokens in the order of the text. The sliding window is that of LLM
in a flash, section 3.1: a row that was active in one of the last k tokens is still in memory, any
other has to be read afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOWS = tuple(range(1, 9))
SPANS = (1, 2, 4, 8, 16)


def fresh_rows(active: np.ndarray, windows: Sequence[int] = WINDOWS) -> dict[str, float]:
    """Mean number of rows read afresh per token, for each window, by the window as text.

    The first tokens, before the longest window is full, are not counted.
    """
    longest = max(windows)
    counts = np.zeros(longest + 2, np.int64)  # by tokens since the row was last active
    last = np.full(active.shape[1], -longest - 1, np.int64)
    for token, bits in enumerate(active):
        rows = np.flatnonzero(bits)
        if token >= longest:
            gaps = np.minimum(token - last[rows], longest + 1)
            counts += np.bincount(gaps, minlength=longest + 2)
        last[rows] = token
    tokens = max(1, len(active) - longest)
    return {str(k): float(counts[k + 1 :].sum() / tokens) for k in windows}


def union_sizes(active: np.ndarray, spans: Sequence[int] = SPANS) -> dict[str, float]:
    """Mean number of rows that are active in any of n consecutive tokens, by n as text."""
    sizes = {}
    for span in spans:
        count = len(active) // span
        if count:
            joined = active[: count * span].reshape(count, span, -1).any(axis=1)
            sizes[str(span)] = float(joined.sum() / count)
    return sizes


def compare(predicted: np.ndarray, active: np.ndarray, strength: np.ndarray) -> dict[str, Any]:
    """How well predicted rows cover the active ones.

    Args:
        predicted, active: bool [tokens, rows].
        strength: [tokens, rows] not negative, what each row adds to the output (the norm of its
            share), 0 where it is not active.

    Returns:
        sparsity: share of rows that are not active.
        active, predicted: rows per token.
        recall: share of active entries that are predicted.
        weighted_recall: the same, entries counted by their strength.
        false_positive_rate: share of inactive entries that are predicted.
        predicted_per_active: ratio of the two counts.
        output_error: norm of what is missed over the norm of the output, rows taken for orthogonal.
    """
    tokens = len(active)
    ones, hits = int(active.sum()), int((active & predicted).sum())
    chosen = int(predicted.sum())
    missed = np.where(predicted, 0, strength)
    return {
        "sparsity": 1 - ones / active.size,
        "active": ones / tokens,
        "predicted": chosen / tokens,
        "recall": hits / ones if ones else 1.0,
        "weighted_recall": 1 - _ratio(missed.sum(dtype=np.float64), strength.sum(dtype=np.float64)),
        "false_positive_rate": _ratio(chosen - hits, active.size - ones),
        "predicted_per_active": _ratio(chosen, ones),
        "output_error": _ratio(_square(missed), _square(strength)) ** 0.5,
    }


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _square(values: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))

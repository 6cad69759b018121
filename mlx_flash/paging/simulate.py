"""What slots do under a policy, without a file: hits and misses of a recorded trace.

The steps are those of ``RowCache``: what forecasts, ``reorder`` and benchmarks count here is what a
model reads.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .policies import Policy
from .slots.slot_table import SlotTable


def misses(steps: Iterable[np.ndarray], rows: int, slots: int, policy: Policy) -> list[np.ndarray]:
    """Row numbers that have to be read in each step, beginning with empty slots.

    Args:
        steps: active rows of each step, sorted, distinct.
        rows: of the layer.
        slots: of the layer; more than rows are as good as one for each.
        policy: which rows leave; new, for it is told of every step.
    """
    table = SlotTable(rows, min(slots, rows))
    found = []
    for active in steps:
        found.append(active[table.slot_of[active] < 0])
        table.update(active[table.admit(active, policy)], policy, told=True)
    return found


def miss_counts(steps: Iterable[np.ndarray], rows: int, slots: int, policy: Policy) -> np.ndarray:
    """How many rows ``misses`` names in each step, int64 [steps]."""
    return np.array([missing.size for missing in misses(steps, rows, slots, policy)], np.int64)

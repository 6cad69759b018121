"""Which of the rows that a step needs are in slots: the package's tables without rows."""

from __future__ import annotations

import numpy as np

from mlx_flash.paging.policies import Policy
from mlx_flash.paging.slot_table import SlotTable


def fetch(table: SlotTable, policy: Policy, active: np.ndarray) -> np.ndarray:
    """What ``RowCache.fetch`` does to a table, without reading: which active rows were there."""
    there = table.slot_of[active] >= 0
    table.update(active[table.admit(active, policy)], policy, told=True)
    return there

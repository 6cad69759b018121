"""The slots of one layer: which row each holds, their memory, and who still reads it.

The sliding window of LLM in a flash (sections 3.1 and 3.3): rows used for one of the last k tokens
stay. The used slots are a prefix, so that a matmul over ``array[:n]`` needs no gather; holes are
filled by new rows first and then from the end of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_flash.storage.row_layout import RowLayout

from ..policies import Policy
from .slot_memory import SlotMemory
from .slot_table import SlotTable, Update

MOST_RETAINED = 64  # results that are kept at most before they are evaluated


class SlotStore:
    """Slots of one layer.

    MLX computes lazily: a result may read slots long after it was built. So whoever builds one
    says so (``retain_until_evaluated``), and ``enter`` evaluates it before slots change.

    Args:
        layout: of the layer's rows.
        rows: of the layer.
        capacity: slots; more than rows are as good as one for each.
        policy: which rows leave.
        parts: of a row, those to keep; None for all.
        unpadded: see ``SlotMemory``.
    """

    def __init__(
        self,
        layout: RowLayout,
        rows: int,
        capacity: int,
        policy: Policy,
        parts: Sequence[str] | None = None,
        unpadded: bool = False,
    ) -> None:
        self.table = SlotTable(rows, min(capacity, rows))
        self.memory = SlotMemory(layout, self.table.capacity, parts=parts, unpadded=unpadded)
        self.policy = policy
        self._retained: list[mx.array] = []
        self._index: mx.array | None = None

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.table.capacity

    def slots_of(self, rows: np.ndarray) -> np.ndarray:
        """Slot of each row, -1 for those that are in none, int32 of the same shape."""
        return self.table.slot_of[rows]

    def enter(self, rows: np.ndarray) -> Update:
        """Give each of some rows (sorted, distinct, no more than slots) a slot.

        Results that read slots which change are evaluated. The policy has been told of the step
        (``SlotTable.admit``). The caller moves slots (``move``), then reads what is missing.
        """
        update = self.table.update(rows, self.policy, told=True)
        if update.changes or len(self._retained) > MOST_RETAINED:
            self._evaluate_retained()
        if update.changes:
            self._index = None
        return update

    def move(self, update: Update) -> None:
        """Copy the slots that an update moves."""
        if update.move_to.size:
            for view in self.memory.views:
                if view is not None:
                    view[update.move_to] = view[update.move_from]

    def _evaluate_retained(self) -> None:
        retained, self._retained = self._retained, []  # what fails is not tried again
        mx.eval(retained)

    def clear(self) -> None:
        """Forget every row; results that read them keep their values all the same."""
        self.table = SlotTable(self.table.rows, self.table.capacity)
        self._index = None

    def retain_until_evaluated(self, *arrays: mx.array) -> None:
        """Say which lazy arrays still read the slots."""
        self._retained.extend(arrays)

    def part(self, name: str) -> mx.array:
        """The used prefix of a part, [num_used, width]; no copy."""
        return self.memory.arrays[name][: self.table.num_used]

    def rows(self) -> np.ndarray:
        """Which row each slot of the used prefix holds, int32 [num_used]."""
        return self.table.row_in[: self.table.num_used].copy()

    def index(self) -> mx.array:
        """``rows`` as an MLX array; made anew only when they have changed."""
        if self._index is None or self._index.size != self.table.num_used:
            self._index = mx.array(self.rows())
        return self._index

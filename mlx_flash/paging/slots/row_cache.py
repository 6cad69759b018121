"""Slots in unified memory: where rows wait and which row is in which slot.

The sliding window of LLM in a flash (sections 3.1 and 3.3): rows used for one of the last k tokens
stay. The used slots are a prefix, so that a matmul over ``array[:n]`` needs no gather; holes are
filled by new rows first and then from the end of the prefix.

Knows: slots, the reader that fills them. Does not know: how active rows are found, which leave
first (``policy``), what an FFN computes, models. The bookkeeping (``SlotTable``) is numpy only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_flash.storage.reader import RowReader

from ..policies import Policy
from .slot_memory import SlotMemory
from .slot_table import SlotTable, Update

UNSETTLED = 64  # so many results are kept for later at most


class RowCache:
    """The rows of one layer that are in memory.

    Args:
        reader: reads the rows.
        layer: number of the layer in the row file.
        capacity: slots.
        policy: which rows leave.
        parts: of a row, those to keep; None for all.
        exact: see ``SlotMemory``.
    """

    def __init__(
        self,
        reader: RowReader,
        layer: int,
        capacity: int,
        policy: Policy,
        *,
        parts: Sequence[str] | None = None,
        exact: bool = False,
    ) -> None:
        rows = reader.file.layers[layer].rows
        self.layer = layer
        self.table = SlotTable(rows, min(capacity, rows))
        layout = reader.file.layers[layer].layout
        self.memory = SlotMemory(layout, self.table.capacity, parts=parts, exact=exact)
        self.policy = policy
        self.hits = 0
        self.misses = 0
        self.wait_seconds = 0.0
        self.foretold = 0
        self.useful = 0
        self._reader = reader
        self._pending: dict[int, list[Future[None]]] = {}
        self._foretold: set[int] = set()
        self._coming: list[Future[None]] = []
        self._stale: list[Future[None]] = []
        self._built_on: list[mx.array] = []
        self._index: mx.array | None = None

    def fetch(self, active: np.ndarray) -> np.ndarray:
        """Read active rows (sorted, distinct) into slots; returns a bool mask of those in slots.

        What was built on the slots (``retain_until_evaluated``) is evaluated before any changes.
        Raises CacheError for what are no rows, ReadError when the disk fails; after a failed read
        the cache is empty.
        """
        self.table.check(active)
        with self.invalidate_on_error():
            inside, update = self._make_room(active)
            began = time.perf_counter()
            self._ask_for_begun(active)
            rows, slots = update.load_rows, update.load_slots
            if rows.size and not self._coming:
                self._reader.read(self.layer, rows, slots, self.memory.views)
            elif rows.size:
                self._coming += self._read(rows, slots)
            self._arrive(began)
        self.misses += int(update.load_rows.size)
        return inside

    def begin(self, active: np.ndarray) -> np.ndarray:
        """Begin to fetch active rows, no more than there are slots, and return while they come.

        Rows returned are still loading and must not be read before ``finish``. Call both inside
        ``invalidate_on_error``, so that an exception in between invalidates the cache.
        """
        self.table.check(active)
        with self.invalidate_on_error():
            _, update = self._make_room(active)
            self.misses += int(update.load_rows.size)
            foretold = [
                row
                for row in self._pending.keys() & set(active.tolist())
                if not all(read.done() for read in self._pending[row])
            ]
            self._ask_for_begun(active)
            if update.load_rows.size:
                self._coming += self._read(update.load_rows, update.load_slots)
        return np.append(update.load_rows, np.array(foretold, np.int64))

    def finish(self) -> None:
        """Wait for what was begun; raises like ``fetch``."""
        with self.invalidate_on_error():
            self._arrive(time.perf_counter())

    def foretell(self, rows: np.ndarray) -> None:
        """Begin to read rows (sorted, distinct) that may be needed soon, behind what is needed now.

        They take slots as active rows do; those that are never asked for leave as any other. A
        window has room for the rows of the last tokens only: nothing is read ahead there.
        """
        if self.policy.is_window:
            return
        self.table.check(rows)
        rows = rows[: self.table.capacity]
        missing = rows[self.table.slot_of[rows] < 0]
        self.foretold += int(missing.size)
        self._foretold = set(missing.tolist())
        if not missing.size:
            return
        with self.invalidate_on_error():
            update = self._change(rows)
            for row, slot in zip(update.load_rows, update.load_slots, strict=True):
                self._pending[int(row)] = self._read(np.array([row]), np.array([slot]), True)

    def _read(
        self, rows: np.ndarray, slots: np.ndarray, behind: bool = False
    ) -> list[Future[None]]:
        prepared = self._reader.prepare(rows, slots, self.memory.views, self.layer)
        return self._reader.submit(self.layer, prepared, behind)

    def _ask_for_begun(self, active: np.ndarray) -> None:
        """Wait with the rest for foretold reads of active rows; ask now for what has not begun."""
        for row in self._pending.keys() & set(active.tolist()):
            reads = self._pending[row]
            if any(read.cancel() for read in reads):
                self._reader.drop(reads)
                self._coming += self._read(np.array([row]), self.table.slot_of[[row]])
            else:
                self._coming += reads
            del self._pending[row]

    def _arrive(self, began: float) -> None:
        """Wait for all that is coming, counting from ``began``."""
        self._reader.wait(self._coming)
        self._coming.clear()
        self.wait_seconds += time.perf_counter() - began

    def reserve(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make room for active rows (sorted, distinct) that the caller reads itself.

        Returns:
            (slots of those that are here, -1 for the others; slots that the others are to be
            copied to once they are read, -1 for those that pass by). Both int [n]. Until that is
            done the caller stays inside ``invalidate_on_error``.
        """
        self.table.check(active)
        with self.invalidate_on_error():
            here = self.table.slot_of[active] >= 0
            self._make_room(active)
            self._ask_for_begun(active)
            self._arrive(time.perf_counter())
            slots = self.table.slot_of[active].astype(np.int64)
        return np.where(here, slots, -1), np.where(here, -1, slots)

    def _make_room(self, active: np.ndarray) -> tuple[np.ndarray, Update]:
        inside = self.table.admit(active, self.policy)
        if self._foretold:
            self.useful += len(self._foretold & set(active.tolist()))
            self._foretold.clear()
        update = self._change(active[inside])
        self.hits += update.hits
        return inside, update

    def _change(self, rows: np.ndarray) -> Update:
        """Enter rows; what was built on slots that change, or is read into them, is done then."""
        if self._stale:  # of a call that was broken off twice
            self._reader.drop(self._stale)
            self._stale.clear()
        update = self.table.update(rows, self.policy, told=True)
        changes = update.load_rows.size or update.move_to.size
        if changes or len(self._built_on) > UNSETTLED:
            mx.eval(self._built_on)
            self._built_on.clear()
        if changes and self._pending:
            self._settle()
        if changes:
            self._index = None
        if update.move_to.size:
            for view in self.memory.views:
                if view is not None:
                    view[update.move_to] = view[update.move_from]
        return update

    def _settle(self) -> None:
        """Forget reads that are done, and let nothing be read for rows that have left."""
        for row, reads in list(self._pending.items()):
            left = self.table.slot_of[row] < 0
            if left:
                self._reader.drop(reads)
            if left or all(read.done() and not read.exception() for read in reads):
                del self._pending[row]

    @contextmanager
    def invalidate_on_error(self) -> Iterator[None]:
        """Whatever fails inside, the cache is empty after that: no slot can be trusted."""
        try:
            yield
        except BaseException:
            self.table = SlotTable(self.table.rows, self.table.capacity)
            self._stale += self._coming
            self._stale += [read for reads in self._pending.values() for read in reads]
            self._coming.clear()
            self._pending.clear()
            self._foretold.clear()
            self._built_on.clear()
            self._index = None
            self._reader.drop(self._stale)  # nothing is written any more
            self._stale.clear()
            raise

    def retain_until_evaluated(self, *arrays: mx.array) -> None:
        """Say which lazy arrays still read the slots."""
        self._built_on.extend(arrays)

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

"""Reads on their way into the slots of one layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from mlx_flash.storage.reader import RowReader

from ..counters import Counters

Reads = list[Future[None]]


class PendingReads:
    """Reads of one layer that have begun and of which nobody knows yet whether they have ended.

    A read is *due* when the current step waits for it. *Early* reads, each of one row, were begun
    behind all that is due; they are claimed once their row is asked for, and dropped when it loses
    its slot before that.

    Args:
        reader: reads the rows.
        layer: number of the layer in the row file.
        views: the slots' memory, see ``SlotMemory.views``.
        counters: count the time waited.

    Attributes:
        early: row -> its reads, of rows that nobody has asked for yet.
    """

    def __init__(
        self,
        reader: RowReader,
        layer: int,
        views: Sequence[np.ndarray | None],
        counters: Counters,
    ) -> None:
        self.reader = reader
        self._layer, self._views = layer, views
        self._counters = counters
        self._due: Reads = []
        self.early: dict[int, Reads] = {}
        self._to_drop: Reads = []

    def read(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Read rows into slots and wait for them and all else that is due.

        Raises ReadError when the disk fails, then or earlier.
        """
        began = time.perf_counter()
        if rows.size and not self._due:  # in this thread, which is cheaper
            self.reader.read(self._layer, rows, slots, self._views)
        elif rows.size:
            self.begin(rows, slots)
        self._wait(began)

    def begin(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Begin to read rows into slots; ``arrive`` waits for them."""
        if rows.size:
            self._due += self._submit(rows, slots)

    def begin_early(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Begin to read rows into slots behind all reads that somebody waits for."""
        for row, slot in zip(rows, slots, strict=True):
            self.early[int(row)] = self._submit(np.array([row]), np.array([slot]), behind=True)

    def claim(self, active: np.ndarray, slot_of: np.ndarray) -> np.ndarray:
        """Early reads of active rows are due now; what has not begun is asked for anew, in front.

        Args:
            slot_of: the slot of every row of the layer.

        Returns:
            Those of the rows that are still loading, int64, in any order.
        """
        loading = []
        for row in self.early.keys() & set(active.tolist()) if self.early else ():
            reads = self.early[row]
            if not all(read.done() for read in reads):
                loading.append(row)
            if any(read.cancel() for read in reads):
                self.reader.drop(reads)
                self.begin(np.array([row]), slot_of[[row]])
            else:
                self._due += reads
            del self.early[row]
        return np.array(loading, np.int64)

    def arrive(self) -> None:
        """Wait for all that is due; raises ReadError when the disk fails."""
        self._wait(time.perf_counter())

    def settle(self, slot_of: np.ndarray) -> None:
        """Forget early reads that have ended well, and drop those of rows that have no slot now.

        To be called after rows have lost their slots and before those slots are written to.
        """
        for row, reads in list(self.early.items()):
            left = slot_of[row] < 0
            if left:
                self.reader.drop(reads)
            if left or all(read.done() and not read.exception() for read in reads):
                del self.early[row]

    def drop(self) -> None:
        """Forget every read; once this returns none of them writes any more.

        Where it is broken off, the next call or ``finish_dropping`` goes on with it.
        """
        self._to_drop += self._due
        self._to_drop += [read for reads in self.early.values() for read in reads]
        self._due.clear()
        self.early.clear()
        self.finish_dropping()

    def finish_dropping(self) -> None:
        """Wait for what a ``drop`` that was broken off has left."""
        if self._to_drop:
            self.reader.drop(self._to_drop)
            self._to_drop.clear()

    def _submit(self, rows: np.ndarray, slots: np.ndarray, behind: bool = False) -> Reads:
        prepared = self.reader.prepare(rows, slots, self._views, self._layer)
        return self.reader.submit(self._layer, prepared, behind)

    def _wait(self, began: float) -> None:
        self.reader.wait(self._due)
        self._due.clear()
        self._counters.wait_seconds += time.perf_counter() - began

"""The rows of one layer that are in memory: slots, and the reads that fill them.

The order of things is what this module adds to ``SlotStore`` and ``PendingReads``. Slots change
only when no result reads them any more and no read writes to them; whatever fails on the way, the
cache is empty after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mlx_flash.storage.reader import RowReader

from ..counters import Counters
from ..policies import Policy
from ..prefetch import AccuracyGate
from .pending_reads import PendingReads
from .slot_store import SlotStore
from .slot_table import Update


@dataclass
class _Prefetched:
    """What was brought for the next step.

    Args:
        predicted: rows that were to be brought.
        read: those of them that were not in slots.
        gate: is told how many of the predicted rows are asked for.
    """

    predicted: np.ndarray
    read: np.ndarray
    gate: AccuracyGate | None


class RowCache:
    """The rows of one layer that are in memory.

    There are three ways to use it, one for each caller: ``fetch`` reads what is missing; ``begin``
    and ``finish`` leave time to compute from what is there; after ``reserve`` the caller reads into
    a buffer of its own and copies.

    Args:
        reader: reads the rows.
        layer: number of the layer in the row file.
        capacity: slots.
        policy: which rows leave.
        parts: of a row, those to keep; None for all.
        unpadded: see ``SlotMemory``.
        counters: shared with whatever else counts; None for its own.
    """

    def __init__(
        self,
        reader: RowReader,
        layer: int,
        capacity: int,
        policy: Policy,
        *,
        parts: Sequence[str] | None = None,
        unpadded: bool = False,
        counters: Counters | None = None,
    ) -> None:
        extent = reader.file.layers[layer]
        self.layer = layer
        self.counters = Counters() if counters is None else counters
        self.slots = SlotStore(extent.layout, extent.rows, capacity, policy, parts, unpadded)
        self.reads = PendingReads(reader, layer, self.slots.memory.views, self.counters)
        self._prefetched: _Prefetched | None = None

    def fetch(self, active: np.ndarray) -> np.ndarray:
        """Read active rows (sorted, distinct) into slots.

        Returns:
            bool [active rows]: those that are in slots; all, unless they are more than slots.

        Raises:
            CacheError: the layer has no such rows.
            ReadError: the disk fails; the cache is empty then.
        """
        self.slots.table.check(active)
        with self.invalidate_on_error():
            inside, update = self._enter(active)
            self.reads.claim(active, self.slots.table.slot_of)
            self.reads.read(update.load_rows, update.load_slots)
        self.counters.misses += int(update.load_rows.size)
        return inside

    def begin(self, active: np.ndarray) -> np.ndarray:
        """Begin to fetch active rows, no more than there are slots, and return while they come.

        Rows returned are still loading and must not be read before ``finish``. Call both inside
        ``invalidate_on_error``, so that an exception in between invalidates the cache.
        """
        self.slots.table.check(active)
        with self.invalidate_on_error():
            _, update = self._enter(active)
            self.counters.misses += int(update.load_rows.size)
            loading = self.reads.claim(active, self.slots.table.slot_of)
            self.reads.begin(update.load_rows, update.load_slots)
        return np.append(update.load_rows, loading)

    def finish(self) -> None:
        """Wait for what was begun; raises like ``fetch``."""
        with self.invalidate_on_error():
            self.reads.arrive()

    def reserve(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make room for active rows (sorted, distinct) that the caller reads itself.

        Until the caller has filled the slots it stays inside ``invalidate_on_error``.

        Returns:
            (hit_slots, fill_slots), both int64 [active rows]: the slots of rows that are there, -1
            for the others; the slots that the others are to be copied to once they are read, -1
            for rows that are there and for those that get no slot.
        """
        self.slots.table.check(active)
        with self.invalidate_on_error():
            hit = self.slots.slots_of(active) >= 0
            self._enter(active)
            self.reads.claim(active, self.slots.table.slot_of)
            self.reads.arrive()
            slots = self.slots.slots_of(active).astype(np.int64)
        return np.where(hit, slots, -1), np.where(hit, -1, slots)

    def prefetch(self, rows: np.ndarray, gate: AccuracyGate | None = None) -> None:
        """Begin to read rows (sorted, distinct) that may be needed next, behind what is needed now.

        They take slots as active rows do; those that are never asked for leave as any other. A
        window has room for the rows of the last steps only: nothing is prefetched there.
        """
        if self.slots.policy.is_window:
            return
        self.slots.table.check(rows)
        rows = rows[: self.slots.capacity]
        missing = rows[self.slots.slots_of(rows) < 0]
        self.counters.prefetched += int(missing.size)
        self._prefetched = _Prefetched(rows, missing, gate)
        if missing.size:
            with self.invalidate_on_error():
                update = self._place(rows)
                self.reads.begin_early(update.load_rows, update.load_slots)

    @contextmanager
    def invalidate_on_error(self) -> Iterator[None]:
        """Whatever fails inside, the cache is empty after that: no slot can be trusted."""
        try:
            yield
        except BaseException:
            self.slots.clear()
            self._prefetched = None
            self.reads.drop()
            raise

    def _enter(self, active: np.ndarray) -> tuple[np.ndarray, Update]:
        """(bool [active rows]: those that get a slot, what is to be read), one step further."""
        inside = self.slots.table.admit(active, self.slots.policy)
        self._count_prefetched(active)
        update = self._place(active[inside])
        self.counters.hits += update.hits
        return inside, update

    def _place(self, rows: np.ndarray) -> Update:
        """Give rows slots; nothing reads or writes those that change when this returns."""
        self.reads.finish_dropping()
        update = self.slots.enter(rows)
        if update.changes:
            self.reads.settle(self.slots.table.slot_of)
        self.slots.move(update)
        return update

    def _count_prefetched(self, active: np.ndarray) -> None:
        brought, self._prefetched = self._prefetched, None
        if brought is None:
            return
        self.counters.prefetch_hits += int(np.isin(brought.read, active).sum())
        if brought.gate:
            hits = int(np.isin(brought.predicted, active).sum())
            brought.gate.count(brought.predicted.size, hits)

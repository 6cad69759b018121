"""Rows of any layer, from slots and from flash, through two buffers that all layers share.

While one buffer is computed from, the other is filled: with the next piece of a layer, or with rows
that the next layer may need (``prefetch``), which are copied and read while this layer's FFN and
the next one's attention are computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import RowLayout

from .counters import Counters
from .prefetch import AccuracyGate
from .slots.row_cache import RowCache
from .slots.slot_memory import SlotMemory, slot_bytes

# A buffer holds one of 4 rows of a layer,
CHUNK_SHARE = 4
# at least 16 MB, so that small layers are summed in one piece, as the dense model does, to the bit,
LEAST_BYTES = 16 << 20
# at most 64 MB, or one row where a row is longer.
CHUNK_BYTES = 64 << 20


def chunk_rows(stride: int, rows: int) -> int:
    """How many rows of ``stride`` bytes a buffer holds, of a layer that has ``rows``."""
    share = max(-(-rows // CHUNK_SHARE), LEAST_BYTES // stride)
    return max(1, min(rows, share, CHUNK_BYTES // stride))


@dataclass
class _Prefetched:
    """Rows of a layer on their way into the buffer whose turn is next.

    Args:
        rows: ascending, one a position of the buffer.
        position: of each row of the layer, -1 for those that are not brought.
        read: positions that are read; the others were copied from slots.
        gate: is told how many of the rows are asked for.
    """

    layer: int
    rows: np.ndarray
    position: np.ndarray
    read: np.ndarray
    reads: list[Future[None]]
    gate: AccuracyGate


@dataclass
class _Piece:
    """Some of the rows wanted, in ascending order, on their way into a buffer.

    Args:
        hit_slots: slot of each row, -1 for those that have to be read.
        fill_slots: slot that each row is copied to once it is read, -1 for none.
    """

    rows: np.ndarray
    hit_slots: np.ndarray
    fill_slots: np.ndarray
    reads: list[Future[None]] = field(default_factory=list)


class RowStream:
    """Brings rows of one layer at a time into one of two buffers.

    Args:
        reader: reads the rows.
        rows: of the largest layer.
        parts: of a row, those that are needed; None for all.
        unpadded: see ``SlotMemory``.
        counters: shared with whatever else counts; None for its own.
    """

    def __init__(
        self,
        reader: RowReader,
        rows: int,
        parts: Sequence[str] | None = None,
        unpadded: bool = False,
        counters: Counters | None = None,
    ) -> None:
        self.capacities = {
            layout: chunk_rows(layout.stride, rows) for layout in reader.file.layouts
        }
        self.counters = Counters() if counters is None else counters
        self._reader = reader
        self._buffers = [self._memories(parts, unpadded) for _ in range(2)]
        self._retained: list[list[mx.array]] = [[], []]
        self._turn = 0
        self._handed_out = 0
        self._prefetched: _Prefetched | None = None

    def _memories(self, parts: Sequence[str] | None, unpadded: bool) -> dict[RowLayout, SlotMemory]:
        """One buffer, laid out for each kind of row; all share its memory."""
        largest = max(
            self.capacities, key=lambda one: self.capacities[one] * slot_bytes(one, parts)
        )
        memory = SlotMemory(largest, self.capacities[largest], parts=parts, unpadded=unpadded)
        rest = {
            layout: SlotMemory(layout, count, share=memory, parts=parts, unpadded=unpadded)
            for layout, count in self.capacities.items()
            if layout != largest
        }
        return {largest: memory, **rest}

    def capacity(self, layer: int) -> int:
        """Rows of a layer that fit one buffer."""
        return self.capacities[self._reader.file.layers[layer].layout]

    def stream_chunks(
        self, layer: int, rows: np.ndarray, cache: RowCache | None
    ) -> Iterator[tuple[np.ndarray, dict[str, mx.array]]]:
        """(row numbers, part -> [n, width]) piece by piece, in ascending order.

        The order is the dense model's, so rows that fit one buffer sum up to the dense model's
        output to the bit.

        Args:
            rows: int [n], sorted.
            cache: the layer's slots, which the rows are taken from where they are there, and where
                they are kept; None to read all and keep none.
        """
        self.drop_prefetched()
        size = self.capacity(layer)
        todo: list[_Piece] = []
        with cache.invalidate_on_error() if cache else contextlib.nullcontext():
            try:
                if cache:
                    hit_slots, fill_slots = cache.reserve(rows)
                else:
                    hit_slots = fill_slots = np.full(rows.size, -1)
                todo += [
                    _Piece(*(array[at : at + size] for array in (rows, hit_slots, fill_slots)))
                    for at in range(0, rows.size, size)
                ]
                for i, piece in enumerate(todo):
                    if i == 0:
                        self._start(layer, piece, cache)
                    buffer = self._buffer(layer)
                    self._wait(piece.reads)
                    if cache:
                        _keep(piece, buffer, cache)
                    turn = self._turn
                    self._turn = 1 - turn
                    if i + 1 < len(todo):
                        self._start(layer, todo[i + 1], cache)
                    self._handed_out = turn
                    count = piece.rows.size
                    yield piece.rows, {n: a[:count] for n, a in buffer.arrays.items()}
            finally:
                self._reader.drop([read for piece in todo for read in piece.reads])

    def _buffer(self, layer: int) -> SlotMemory:
        return self._buffers[self._turn][self._reader.file.layers[layer].layout]

    def retain_until_evaluated(self, result: mx.array) -> None:
        """Say which lazy array reads the piece handed out last; it is set going."""
        mx.async_eval(result)
        self._retained[self._handed_out].append(result)

    def prefetch(self, cache: RowCache, rows: np.ndarray, gate: AccuracyGate) -> None:
        """Begin to fill the next buffer with rows (sorted, distinct) that may be asked for next.

        No slot changes; the rows wait in the buffer for ``gather`` of the same layer, and are
        dropped when anything else is asked for. More rows than a buffer holds are not prefetched.

        Args:
            cache: slots of the layer whose rows they are.
            gate: is told how many of the rows are asked for.
        """
        self.drop_prefetched()
        layer = cache.layer
        if not 0 < rows.size <= self.capacity(layer):
            gate.count(rows.size, 0)
            return
        buffer = self._buffer(layer)
        self._free()
        slots = cache.slots.slots_of(rows)
        missing = np.flatnonzero(slots < 0)
        _copy(cache, slots, buffer, 0)
        position = np.full(cache.slots.table.rows, -1, np.int32)
        position[rows] = np.arange(rows.size, dtype=np.int32)
        reads = self._read(layer, rows[missing], missing, buffer)
        self._prefetched = _Prefetched(layer, rows, position, missing, reads, gate)
        self.counters.prefetched += missing.size

    def drop_prefetched(self) -> None:
        """Let go of what was prefetched; nothing writes into the buffers for it any more."""
        brought, self._prefetched = self._prefetched, None
        if brought:
            self._reader.drop(brought.reads)

    @contextlib.contextmanager
    def gather(
        self, layer: int, rows: np.ndarray, cache: RowCache
    ) -> Iterator[tuple[np.ndarray, dict[str, mx.array]]]:
        """(row numbers, part -> [n, width]) of rows that fit one buffer, and of prefetched ones.

        Prefetched rows come first, in ascending order, asked for or not; behind them, in ascending
        order, those that were not prefetched. So the order depends on what is prefetched and asked
        for, not on what is in slots. What is read finds its way into slots when the caller is done,
        so that it can be copied while the caller's result is computed.
        """
        brought, self._prefetched = self._prefetched, None
        reads = list(brought.reads) if brought else []
        try:
            if brought and not self._fits(brought, layer, rows):
                self._reader.drop(reads)
                brought, reads = None, []
            with cache.invalidate_on_error():
                hit_slots, fill_slots = cache.reserve(rows)
                buffer = self._buffer(layer)
                if brought is None:
                    self._free()
                    place = np.full(rows.size, -1, np.int32)
                else:
                    place = brought.position[rows]
                    brought.gate.count(brought.rows.size, int((place >= 0).sum()))
                    self.counters.prefetch_hits += int(np.isin(place, brought.read).sum())
                first = brought.rows.size if brought else 0
                extra = np.flatnonzero(place < 0)
                place[extra] = np.arange(first, first + extra.size)
                _copy(cache, hit_slots[extra], buffer, first)
                missing = extra[hit_slots[extra] < 0]
                reads += self._read(layer, rows[missing], place[missing], buffer)
                self._wait(reads)
                self._handed_out, self._turn = self._turn, 1 - self._turn
                count = first + extra.size
                order = rows[extra] if brought is None else np.append(brought.rows, rows[extra])
                yield order, {name: array[:count] for name, array in buffer.arrays.items()}
                filled = np.flatnonzero(fill_slots >= 0)
                _into_slots(buffer, place[filled], cache, fill_slots[filled])
        finally:
            self._reader.drop(reads)

    def _fits(self, brought: _Prefetched, layer: int, rows: np.ndarray) -> bool:
        """Whether what was prefetched is of this layer, and leaves room for the rest."""
        if brought.layer != layer:
            return False
        extra = int((brought.position[rows] < 0).sum())
        return brought.rows.size + extra <= self.capacity(layer)

    def _read(
        self, layer: int, rows: np.ndarray, places: np.ndarray, buffer: SlotMemory
    ) -> list[Future[None]]:
        if not rows.size:
            return []
        self.counters.misses += rows.size
        prepared = self._reader.prepare(rows, places, buffer.views, layer)
        return self._reader.submit(layer, prepared)

    def _wait(self, reads: list[Future[None]]) -> None:
        began = time.perf_counter()
        self._reader.wait(reads)
        self.counters.wait_seconds += time.perf_counter() - began

    def _free(self) -> None:
        """Wait until nothing is computed from the buffer whose turn it is."""
        retained, self._retained[self._turn] = self._retained[self._turn], []
        mx.eval(retained)

    def _start(self, layer: int, piece: _Piece, cache: RowCache | None) -> None:
        """Fill the buffer whose turn it is: copy what is in slots, begin to read the rest."""
        buffer = self._buffer(layer)
        self._free()
        missing = np.flatnonzero(piece.hit_slots < 0)
        if cache and missing.size < piece.rows.size:
            _copy(cache, piece.hit_slots, buffer, 0)
        piece.reads = self._read(layer, piece.rows[missing], missing, buffer)


def _copy(cache: RowCache, slots: np.ndarray, buffer: SlotMemory, first: int) -> None:
    """Copy slots to a buffer, from position ``first`` on; what is at slot -1 is any row."""
    if not (slots >= 0).any():
        return
    for source, target in zip(cache.slots.memory.views, buffer.views, strict=True):
        if source is not None and target is not None:
            # What is missing is copied from slot 0 and read over: cheaper than two passes.
            out = target[first : first + slots.size]
            np.take(source, slots, axis=0, out=out, mode="clip")


def _keep(piece: _Piece, buffer: SlotMemory, cache: RowCache) -> None:
    """Copy what was read and has a slot into it."""
    filled = np.flatnonzero(piece.fill_slots >= 0)
    _into_slots(buffer, filled, cache, piece.fill_slots[filled])


def _into_slots(buffer: SlotMemory, places: np.ndarray, cache: RowCache, slots: np.ndarray) -> None:
    if not places.size:
        return
    for source, target in zip(buffer.views, cache.slots.memory.views, strict=True):
        if source is not None and target is not None:
            target[slots] = source[places]

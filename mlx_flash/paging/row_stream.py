"""Rows of any layer in ascending order, from slots and from flash, through two buffers.

While one buffer is computed from, the other is filled: with the next piece of a layer, or with what
the next layer is foretold to need (``foretell``), which is copied and read while this layer's FFN
and the next one's attention are computed.

Knows: a row file's reader, slots of one layer at a time. Does not know: what is computed, which
rows are wanted or how they were foretold.
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

from .prefetch import Guesses
from .slots.row_cache import RowCache
from .slots.slot_memory import SlotMemory, slot_bytes

CHUNK_BYTES = 64 << 20  # of each of the two buffers, at most
CHUNK_SHARE = 4  # and one row in so many, unless
LEAST_BYTES = 16 << 20  # hold more: of rows in one piece the sum is the dense model's to the bit


def chunk_rows(stride: int, rows: int) -> int:
    """How many rows a buffer holds."""
    share = max(-(-rows // CHUNK_SHARE), LEAST_BYTES // stride)
    return max(1, min(rows, share, CHUNK_BYTES // stride))


@dataclass
class _Ahead:
    """What was foretold of a layer, on its way into the buffer whose turn is next."""

    layer: int
    rows: np.ndarray  # ascending, one a position
    position: np.ndarray  # of each row of the layer, -1 for none
    read: np.ndarray  # positions that are read, the others are copied
    reads: list[Future[None]]


@dataclass
class _Piece:
    """Some of the rows wanted, in ascending order, on their way into a buffer."""

    rows: np.ndarray
    here: np.ndarray  # slots, -1 for what has to be read
    keep: np.ndarray  # slots to copy to, -1 for what passes by
    reads: list[Future[None]] = field(default_factory=list)


class RowStream:
    """Rows of any layer in ascending order, from slots and from flash, through two buffers.

    While one buffer is computed from, the other is filled. The order is the dense model's, so where
    the rows fit one buffer their sum is the dense one's to the bit. All layers share the buffers.

    Args:
        reader: reads the rows.
        rows: of the largest layer.
        parts: of a row, those that are needed; None for all.
        exact: see ``SlotMemory``.
    """

    def __init__(
        self,
        reader: RowReader,
        rows: int,
        parts: Sequence[str] | None = None,
        exact: bool = False,
    ) -> None:
        self.capacities = {
            layout: chunk_rows(layout.stride, rows) for layout in reader.file.layouts
        }
        self.wait_seconds = 0.0
        self.rows_read = 0
        self._reader = reader
        self._buffers = [self._memories(parts, exact) for _ in range(2)]
        self._built_on: list[list[mx.array]] = [[], []]
        self._turn = 0
        self._handed_out = 0
        self._ahead: _Ahead | None = None
        self.guesses: dict[int, Guesses] = {}

    def _memories(self, parts: Sequence[str] | None, exact: bool) -> dict[RowLayout, SlotMemory]:
        """One buffer, laid out for each kind of row; all share its memory."""
        largest = max(
            self.capacities, key=lambda one: self.capacities[one] * slot_bytes(one, parts)
        )
        memory = SlotMemory(largest, self.capacities[largest], parts=parts, exact=exact)
        rest = {
            layout: SlotMemory(layout, count, share=memory, parts=parts, exact=exact)
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
        """(row numbers, part -> [n, width]) piece by piece.

        Args:
            rows: int [n], sorted.
            cache: the layer's slots, which the rows are taken from where they are there, and where
                they are kept; None to read all and keep none.
        """
        self.forget()
        size = self.capacity(layer)
        todo: list[_Piece] = []
        with cache.invalidate_on_error() if cache else contextlib.nullcontext():
            try:
                if cache:
                    here, keep = cache.reserve(rows)
                else:
                    here = keep = np.full(rows.size, -1)
                todo += [
                    _Piece(*(array[at : at + size] for array in (rows, here, keep)))
                    for at in range(0, rows.size, size)
                ]
                for i, piece in enumerate(todo):
                    if i == 0:
                        self._start(layer, piece, cache)
                    buffer = self._buffer(layer)
                    began = time.perf_counter()
                    self._reader.wait(piece.reads)
                    self.wait_seconds += time.perf_counter() - began
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
        self._built_on[self._handed_out].append(result)

    def foretell(self, layer: int, rows: np.ndarray, cache: RowCache) -> None:
        """Begin to fill the next buffer with rows (sorted, distinct) that may be asked for next.

        No slot changes; the rows wait in the buffer for ``gather`` of the same layer, and are
        forgotten when anything else is asked for. More rows than a buffer holds are not foretold.
        """
        self.forget()
        guesses = self.guesses.setdefault(layer, Guesses())
        if not 0 < rows.size <= self.capacity(layer):
            guesses.count(rows.size, 0)
            return
        buffer = self._buffer(layer)
        self._free()
        slots = cache.table.slot_of[rows]
        missing = np.flatnonzero(slots < 0)
        _copy(cache, slots, buffer, 0)
        position = np.full(cache.table.rows, -1, np.int32)
        position[rows] = np.arange(rows.size, dtype=np.int32)
        reads = self._read(layer, rows[missing], missing, buffer)
        self._ahead = _Ahead(layer, rows, position, missing, reads)
        cache.foretold += missing.size

    def foretells(self, layer: int) -> bool:
        """Whether it pays for this layer, as far as is known."""
        return layer not in self.guesses or self.guesses[layer].pay

    def forget(self) -> None:
        """Let go of what was foretold; nothing writes into the buffers for it any more."""
        ahead, self._ahead = self._ahead, None
        if ahead:
            self._reader.drop(ahead.reads)

    @contextlib.contextmanager
    def gather(
        self, layer: int, rows: np.ndarray, cache: RowCache
    ) -> Iterator[tuple[np.ndarray, dict[str, mx.array]]]:
        """(row numbers, part -> [n, width]) of rows that fit one buffer, and what was foretold.

        Foretold rows come first, in ascending order, asked for or not; behind them, in ascending
        order, those that were not foretold. So the order depends on what is foretold and asked
        for, not on what is in slots. What is read finds its way into slots when the caller is done,
        so that it can be copied while the caller's result is computed.
        """
        ahead, self._ahead = self._ahead, None
        reads = list(ahead.reads) if ahead else []
        try:
            if ahead and not self._fits(ahead, layer, rows):
                self._reader.drop(reads)
                ahead, reads = None, []
            with cache.invalidate_on_error():
                here, keep = cache.reserve(rows)
                buffer = self._buffer(layer)
                if ahead is None:
                    self._free()
                    place = np.full(rows.size, -1, np.int32)
                else:
                    place = ahead.position[rows]
                    self.guesses[layer].count(ahead.rows.size, int((place >= 0).sum()))
                    cache.useful += int(np.isin(place, ahead.read).sum())
                first = ahead.rows.size if ahead else 0
                extra = np.flatnonzero(place < 0)
                place[extra] = np.arange(first, first + extra.size)
                _copy(cache, here[extra], buffer, first)
                missing = extra[here[extra] < 0]
                reads += self._read(layer, rows[missing], place[missing], buffer)
                began = time.perf_counter()
                self._reader.wait(reads)
                self.wait_seconds += time.perf_counter() - began
                self._handed_out, self._turn = self._turn, 1 - self._turn
                count = first + extra.size
                order = rows[extra] if ahead is None else np.append(ahead.rows, rows[extra])
                yield order, {name: array[:count] for name, array in buffer.arrays.items()}
                kept = np.flatnonzero(keep >= 0)
                _into_slots(buffer, place[kept], cache, keep[kept])
        finally:
            self._reader.drop(reads)

    def _fits(self, ahead: _Ahead, layer: int, rows: np.ndarray) -> bool:
        """Whether what was foretold is of this layer, and leaves room for the rest."""
        if ahead.layer != layer:
            return False
        extra = int((ahead.position[rows] < 0).sum())
        return ahead.rows.size + extra <= self.capacity(layer)

    def _read(
        self, layer: int, rows: np.ndarray, places: np.ndarray, buffer: SlotMemory
    ) -> list[Future[None]]:
        if not rows.size:
            return []
        self.rows_read += rows.size
        prepared = self._reader.prepare(rows, places, buffer.views, layer)
        return self._reader.submit(layer, prepared)

    def _free(self) -> None:
        """Wait until nothing is computed from the buffer whose turn it is."""
        mx.eval(self._built_on[self._turn])
        self._built_on[self._turn].clear()

    def _start(self, layer: int, piece: _Piece, cache: RowCache | None) -> None:
        """Fill the buffer whose turn it is: copy what is in slots, begin to read the rest."""
        buffer = self._buffer(layer)
        self._free()
        missing = np.flatnonzero(piece.here < 0)
        if cache and missing.size < piece.rows.size:
            _copy(cache, piece.here, buffer, 0)
        piece.reads = self._read(layer, piece.rows[missing], missing, buffer)


def _copy(cache: RowCache, slots: np.ndarray, buffer: SlotMemory, first: int) -> None:
    """Copy slots to a buffer, from position ``first`` on; what is at slot -1 is any row."""
    if not (slots >= 0).any():
        return
    for source, target in zip(cache.memory.views, buffer.views, strict=True):
        if source is not None and target is not None:
            # What is missing is copied from slot 0 and read over: cheaper than two passes.
            out = target[first : first + slots.size]
            np.take(source, slots, axis=0, out=out, mode="clip")


def _keep(piece: _Piece, buffer: SlotMemory, cache: RowCache) -> None:
    """Copy what was read and has a slot into it."""
    kept = np.flatnonzero(piece.keep >= 0)
    _into_slots(buffer, kept, cache, piece.keep[kept])


def _into_slots(buffer: SlotMemory, places: np.ndarray, cache: RowCache, slots: np.ndarray) -> None:
    if not places.size:
        return
    for source, target in zip(buffer.views, cache.memory.views, strict=True):
        if source is not None and target is not None:
            target[slots] = source[places]

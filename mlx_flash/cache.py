"""Slots in unified memory: where rows wait and which row is in which slot.

The sliding window of LLM in a flash (sections 3.1 and 3.3): rows used for one of the last k tokens
stay. The used slots are a prefix, so that a matmul over ``array[:n]`` needs no gather; holes are
filled by new rows first and then from the end of the prefix.

Knows: slots, the reader that fills them. Does not know: how active rows are found, which leave
first (``policy``), what an FFN computes, models. The bookkeeping (``SlotTable``) is numpy only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from . import huge_pages
from .errors import CacheError
from .layout import PAGE, RowLayout
from .policy import Policy, SlidingWindow
from .reader import RowReader

DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U8": mx.uint8,
    "U32": mx.uint32,
}
UNITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
LARGEST = 2**31 - 1  # elements of an MLX array along one axis
UNSETTLED = 64  # so many results are kept for later at most


def aligned_bytes(nbytes: int, dtype: mx.Dtype = mx.uint8) -> tuple[mx.array, np.ndarray]:
    """``nbytes`` of page-aligned zeros as an MLX array and a writable uint8 view of the same.

    On Linux it is on huge pages, and only taken as it is written to.
    MLX counts elements in 32 bits: 2 GiB and more need a wider ``dtype`` than uint8.
    """
    count = -(-nbytes // dtype.size)
    if count + PAGE > LARGEST:
        raise CacheError(f"{nbytes} bytes of slots are more than one MLX array holds")
    raw = mx.zeros((count + PAGE // dtype.size,), dtype)
    mx.eval(raw)
    skip = -np.array(raw, copy=False).ctypes.data % PAGE // dtype.size
    aligned = raw[skip : skip + count]
    mx.eval(aligned)
    view = _bytes_of(aligned)
    if mx.default_device().type == mx.DeviceType.cpu:  # a GPU's driver minds its own pages
        huge_pages.ask_for(view)
    return aligned, view


def _bytes_of(array: mx.array) -> np.ndarray:
    return np.array(array, copy=False).view(np.uint8)


def slot_bytes(layout: RowLayout, parts: Sequence[str] | None = None) -> int:
    """Memory that a slot takes for these parts of a row; None for all of them."""
    extents = zip(layout.parts, layout.extents, strict=True)
    return sum(extent for part, extent in extents if parts is None or part.name in parts)


def _spans(
    layout: RowLayout, capacity: int, parts: Sequence[str] | None
) -> dict[str, tuple[int, int]]:
    """Part -> from which to which byte of the memory its slots are."""
    at, found = 0, {}
    for part, extent in zip(layout.parts, layout.extents, strict=True):
        if parts is None or part.name in parts:
            start = -(-at // 4) * 4
            found[part.name] = (start, at := start + capacity * extent)
    return found


def _shaped(array: mx.array, shape: tuple[int, ...], capacity: int, stride: int) -> mx.array:
    """[capacity, *shape] over an array [capacity, stride], not copied."""
    inner = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    shaped = mx.as_strided(array, (capacity, *shape), (stride, *inner))
    mx.eval(shaped)
    return shaped


class SlotMemory:
    """Memory for ``capacity`` rows, one array per part.

    ``arrays[name]`` is an MLX array [capacity, width], ``views`` the same memory as uint8 arrays
    [capacity, extent], in the layout's order, for the reader to fill. Where the layout pads parts
    to sectors, ``width`` is wider than the part by that padding. ``share`` lays the memory of
    another one, at least as large, out for fewer rows. Parts that are not among ``parts`` have no
    memory, and None for a view. With ``exact``, arrays are [capacity, *shape of the part], which
    stride over the padding. ``nbytes`` counts memory of its own.
    """

    def __init__(
        self,
        layout: RowLayout,
        capacity: int,
        share: SlotMemory | None = None,
        parts: Sequence[str] | None = None,
        exact: bool = False,
    ) -> None:
        self.capacity = capacity
        spans = _spans(layout, capacity, parts)
        nbytes = max((stop for _, stop in spans.values()), default=0)
        if share is None:
            self._memory, view = aligned_bytes(nbytes, mx.uint32)  # counts in 32 bits
            self.nbytes = self._memory.nbytes + PAGE
        else:
            self._memory, view = share.first(nbytes)
            self.nbytes = 0
        self.arrays: dict[str, mx.array] = {}
        self.views: list[np.ndarray | None] = []
        self._spans: dict[str, tuple[int, int, mx.Dtype]] = {}
        self._joined: dict[tuple[str, str], mx.array] = {}
        for part, extent in zip(layout.parts, layout.extents, strict=True):
            if part.name not in spans:
                self.views.append(None)
                continue
            start, stop = spans[part.name]
            dtype = DTYPES[part.dtype]
            self._spans[part.name] = (start, stop, dtype)
            array = self._typed(start, stop, dtype, capacity)
            if exact:
                array = _shaped(array, part.shape, capacity, extent // dtype.size)
            self.arrays[part.name] = array
            self.views.append(view[start:stop].reshape(capacity, extent))

    def first(self, nbytes: int) -> tuple[mx.array, np.ndarray]:
        """The first bytes of this memory, to lay out another way; both then overlap."""
        if nbytes > self._memory.nbytes:
            raise CacheError(f"{self._memory.nbytes} bytes of slots cannot be shared as {nbytes}")
        part = self._memory[: -(-nbytes // self._memory.itemsize)]
        mx.eval(part)
        return part, _bytes_of(part)

    def joined(self, first: str, second: str) -> mx.array:
        """Two parts that lie behind each other as one array [2 * capacity, width], not copied."""
        if (first, second) not in self._joined:
            self._joined[first, second] = self._join(first, second)
        return self._joined[first, second]

    def _join(self, first: str, second: str) -> mx.array:
        (start, middle, dtype), (begin, stop, other) = self._spans[first], self._spans[second]
        if middle != begin or dtype != other or middle - start != stop - begin:
            raise CacheError(f"parts {first} and {second} do not lie behind each other")
        return self._typed(start, stop, dtype, 2 * self.capacity)

    def _typed(self, start: int, stop: int, dtype: mx.Dtype, rows: int) -> mx.array:
        size = self._memory.itemsize
        flat = self._memory[start // size : -(-stop // size)].view(dtype)
        array = flat[: (stop - start) // dtype.size].reshape(rows, -1)
        mx.eval(array)
        return array


@dataclass
class Update:
    """What has to happen so that the active rows are in slots.

    First slots ``move_from`` are copied to ``move_to``, then row ``load_rows[i]`` is read into
    slot ``load_slots[i]``. ``load_rows`` is sorted.
    """

    load_rows: np.ndarray
    load_slots: np.ndarray
    move_from: np.ndarray
    move_to: np.ndarray
    hits: int


@dataclass
class SlotTable:
    """Which row is in which slot. Slots below ``num_used`` are in use, without holes."""

    rows: int
    capacity: int
    num_used: int = 0
    slot_of: np.ndarray = field(init=False)
    row_in: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise CacheError(f"a cache needs at least one slot, got {self.capacity}")
        self.slot_of = np.full(self.rows, -1, np.int32)
        self.row_in = np.full(self.capacity, -1, np.int32)

    def admit(self, active: np.ndarray, policy: Policy) -> np.ndarray:
        """Tell the policy of a step, and ask which of its rows are to be in slots: a bool mask.

        All of them, unless there are more than slots: then those that are there already, and of
        the others those that the policy would let go last. The rest pass by.

        Raises CacheError when they are no such rows; nothing is changed then.
        """
        self._check(active)
        policy.used(active)
        if active.size <= self.capacity:
            return np.ones(active.size, bool)
        inside = self.slot_of[active] >= 0
        missing = np.flatnonzero(~inside)
        order = np.argsort(-np.asarray(policy.rank(active[missing])), kind="stable")
        inside[missing[order[: self.capacity - int(inside.sum())]]] = True
        return inside

    def update(self, active: np.ndarray, policy: Policy, told: bool = False) -> Update:
        """Make room for the active rows (sorted, distinct) and enter them, all of them.

        Args:
            told: the policy knows already what this step uses.

        Raises CacheError when there are more active rows than slots, or when they are no such
        rows; nothing is changed then.
        """
        self._check(active)
        if active.size > self.capacity:
            raise CacheError(
                f"{active.size} rows are active at once, the cache has {self.capacity} slots; "
                "give it more RAM or fetch in several rounds"
            )
        if not told:
            policy.used(active)
        missing = active[self.slot_of[active] < 0]
        holes = self._evict(active, missing.size, policy)
        filled = min(holes.size, missing.size)
        appended = np.arange(self.num_used, self.num_used + missing.size - filled, dtype=np.int32)
        slots = np.concatenate([holes[:filled], appended])
        self.num_used += appended.size
        move_from, move_to = self._close(holes[filled:])
        self.slot_of[missing] = slots
        self.row_in[slots] = missing
        return Update(missing, slots, move_from, move_to, int(active.size - missing.size))

    def _check(self, active: np.ndarray) -> None:
        if active.ndim != 1 or active.dtype.kind not in "iu":
            raise CacheError(f"active rows must be ints, got {active.dtype} {active.shape}")
        if active.size and not (
            active[0] >= 0 and active[-1] < self.rows and bool((active[1:] > active[:-1]).all())
        ):
            raise CacheError(f"active rows must be sorted, distinct and below {self.rows}")

    def _evict(self, active: np.ndarray, wanted: int, policy: Policy) -> np.ndarray:
        """Free slots, in ascending order."""
        cached = self.row_in[: self.num_used]
        needed = self.slot_of[active]
        needed = needed[needed >= 0]
        leaving = np.array(policy.expired(cached), bool)
        leaving[needed] = False
        lacking = wanted - (self.capacity - self.num_used) - int(leaving.sum())
        if lacking > 0:
            staying = ~leaving
            staying[needed] = False
            others = np.flatnonzero(staying)
            rank = np.asarray(policy.rank(cached[others]))
            leaving[others[np.argpartition(rank, lacking - 1)[:lacking]]] = True
        holes = np.flatnonzero(leaving).astype(np.int32)
        self.slot_of[cached[holes]] = -1
        self.row_in[holes] = -1
        return holes

    def _close(self, holes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fill holes from the end of the prefix (the paper's deletion, O(holes))."""
        self.num_used -= holes.size
        targets = holes[holes < self.num_used]
        tail = np.arange(self.num_used, self.num_used + holes.size, dtype=np.int32)
        sources = tail[self.row_in[tail] >= 0]
        moved = self.row_in[sources]
        self.row_in[targets] = moved
        self.slot_of[moved] = targets
        self.row_in[tail] = -1
        return sources, targets


class RowCache:
    """The rows of one layer that are in memory.

    Args:
        reader: reads the rows.
        layer: number of the layer in the row file.
        capacity: slots.
        policy: which rows leave; a ``SlidingWindow`` unless given otherwise.
        window: tokens that the default policy keeps rows for.
        parts: of a row, those to keep; None for all.
        exact: see ``SlotMemory``.
    """

    def __init__(
        self,
        reader: RowReader,
        layer: int,
        capacity: int,
        *,
        window: int = 4,
        policy: Policy | None = None,
        parts: Sequence[str] | None = None,
        exact: bool = False,
    ) -> None:
        rows = reader.file.layers[layer].rows
        self.layer = layer
        self.table = SlotTable(rows, min(capacity, rows))
        layout = reader.file.layers[layer].layout
        self.memory = SlotMemory(layout, self.table.capacity, parts=parts, exact=exact)
        self.policy = policy or SlidingWindow(rows, window)
        self.hits = 0
        self.misses = 0
        self.wait_seconds = 0.0
        self.foretold = 0
        self.useful = 0
        self._reader = reader
        self._pending: dict[int, list[Future[None]]] = {}
        self._foretold: set[int] = set()
        self._coming: list[Future[None]] = []
        self._built_on: list[mx.array] = []
        self._index: mx.array | None = None

    def fetch(self, active: np.ndarray) -> np.ndarray:
        """Read active rows (sorted, distinct) into slots; returns a bool mask of those in slots.

        What was built on the slots (see ``built``) is evaluated before any of them changes.
        Raises CacheError for what are no rows, ReadError when the disk fails; after a failed read
        the cache is empty.
        """
        inside, update = self._make_room(active)
        with self.sound():
            began = time.perf_counter()
            waiting = self._begun(active)
            rows, slots = update.load_rows, update.load_slots
            if rows.size and not waiting:
                self._reader.read(self.layer, rows, slots, self.memory.views)
            elif rows.size:
                waiting += self._read(rows, slots)
            self._reader.wait(waiting)
            self.wait_seconds += time.perf_counter() - began
        self.misses += int(update.load_rows.size)
        return inside

    def begin(self, active: np.ndarray) -> np.ndarray:
        """Begin to fetch active rows, no more than there are slots, and return while they come.

        Until ``finish`` those that are returned may not be computed from, the others may.
        """
        _, update = self._make_room(active)
        self.misses += int(update.load_rows.size)
        with self.sound():
            foretold = [
                row
                for row in self._pending.keys() & set(active.tolist())
                if not all(read.done() for read in self._pending[row])
            ]
            self._coming += self._begun(active)
            if update.load_rows.size:
                self._coming += self._read(update.load_rows, update.load_slots)
        return np.append(update.load_rows, np.array(foretold, np.int64))

    def finish(self) -> None:
        """Wait for what was begun; raises like ``fetch``."""
        with self.sound():
            began = time.perf_counter()
            self._reader.wait(self._coming)
            self._coming.clear()
            self.wait_seconds += time.perf_counter() - began

    def foretell(self, rows: np.ndarray) -> None:
        """Begin to read rows (sorted, distinct) that may be needed soon, behind what is needed now.

        They take slots as active rows do; those that are never asked for leave as any other. A
        window has room for the rows of the last tokens only: nothing is read ahead there.
        """
        if self.is_window:
            return
        rows = rows[: self.table.capacity]
        missing = rows[self.table.slot_of[rows] < 0]
        self.foretold += int(missing.size)
        self._foretold = set(missing.tolist())
        if not missing.size:
            return
        update = self._change(rows)
        with self.sound():
            for row, slot in zip(update.load_rows, update.load_slots, strict=True):
                self._pending[int(row)] = self._read(np.array([row]), np.array([slot]), True)

    def _read(
        self, rows: np.ndarray, slots: np.ndarray, behind: bool = False
    ) -> list[Future[None]]:
        prepared = self._reader.prepare(rows, slots, self.memory.views, self.layer)
        return self._reader.submit(self.layer, prepared, behind)

    def _begun(self, active: np.ndarray) -> list[Future[None]]:
        """Reads of active rows that were foretold; what has not begun is asked for now."""
        waiting: list[Future[None]] = []
        for row in self._pending.keys() & set(active.tolist()):
            reads = self._pending.pop(row)
            late = [read for read in reads if read.cancel()]
            if late:
                self._reader.drop(reads)
                waiting += self._read(np.array([row]), self.table.slot_of[[row]])
            else:
                waiting += reads
        return waiting

    def claim(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make room for active rows (sorted, distinct) that the caller reads itself.

        Returns:
            (slots of those that are here, -1 for the others; slots that the others are to be
            copied to once they are read, -1 for those that pass by). Both int [n].
        """
        here = self.table.slot_of[active] >= 0
        self._make_room(active)
        with self.sound():
            self._reader.wait(self._begun(active))
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
        update = self.table.update(rows, self.policy, told=True)
        changes = update.load_rows.size or update.move_to.size
        with self.sound():
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
    def sound(self) -> Iterator[None]:
        """Whatever fails inside, the cache is empty after that: no slot can be trusted."""
        try:
            yield
        except BaseException:
            self._reader.drop([read for reads in self._pending.values() for read in reads])
            self._pending.clear()
            self._reader.drop(self._coming)
            self._coming.clear()
            self._foretold.clear()
            self.table = SlotTable(self.table.rows, self.table.capacity)
            self._built_on.clear()
            self._index = None
            raise

    @property
    def is_window(self) -> bool:
        """Whether the slots hold the rows of the last tokens and no others."""
        return isinstance(self.policy, SlidingWindow)

    def built(self, *arrays: mx.array) -> None:
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

"""Slots, buffers and prefetching in any order of use, on a disk that fails now and then.

Whatever happens, a slot holds the row that the table says, or the cache is empty; what is handed
out is what was asked for; results keep their values until they are looked at.
"""

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.row_files import make

from mlx_flash.errors import ReadError
from mlx_flash.paging import row_stream
from mlx_flash.paging.policies import make_policy
from mlx_flash.paging.prefetch import AccuracyGate
from mlx_flash.paging.row_stream import RowStream
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_file import RowFile
from mlx_flash.storage.row_layout import RowLayout

LAYOUT = RowLayout.plan(["up", "down"], "F32", 1024)
LAYERS, ROWS = 2, 16
CHUNK = 6  # rows that a buffer holds
MASK = 0x5A5A5A5A
layers = st.integers(0, LAYERS - 1)


def rows(most: int = ROWS) -> st.SearchStrategy[np.ndarray]:
    numbers = st.lists(st.integers(0, ROWS - 1), max_size=most, unique=True)
    return numbers.map(lambda found: np.array(sorted(found), np.int64))


class Interrupt(BaseException):
    """In the place of KeyboardInterrupt, which would end the test run."""


class Disk:
    """os.preadv on which some rows cannot be read."""

    def __init__(self, file: RowFile) -> None:
        self.file, self.real = file, os.preadv
        self.broken: set[tuple[int, int]] = set()
        self.seconds = 0.0  # that each read takes

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        stop = offset + sum(memoryview(buffer).nbytes for buffer in buffers)
        for layer, row in self.broken:
            at = self.file.layers[layer].offset + row * LAYOUT.stride
            if at < stop and offset < at + LAYOUT.stride:
                raise OSError(errno.EIO, "Input/output error")
        time.sleep(self.seconds)
        return self.real(fd, buffers, offset)


class Paging(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        file, self.blocks = make(Path(folder) / "rows", LAYOUT, [ROWS] * LAYERS)
        self.disk = Disk(file)
        for target, name, value in (
            (os, "preadv", self.disk.preadv),
            (row_stream, "CHUNK_BYTES", CHUNK * LAYOUT.stride),
            (row_stream, "CHUNK_SHARE", 1),
        ):
            self.stack.enter_context(mock.patch.object(target, name, value))
        self.reader = RowReader(file, threads=2, gap_bytes=0, engine="threads")
        self.gate = AccuracyGate(0.0)
        self.suspicious: set[int] = set()  # layers of which a read may fail, or has failed
        self.in_buffer: int | None = None  # the layer of which rows were prefetched last
        self.promised: list[tuple[mx.array, np.ndarray]] = []

    @initialize(
        spec=st.sampled_from(["lru", "lfu", "window:2"]),
        slots=st.integers(1, ROWS + 2),
        seconds=st.sampled_from([0.0, 0.001]),
    )
    def start(self, spec: str, slots: int, seconds: float) -> None:
        self.disk.seconds = seconds
        self.caches = [
            RowCache(self.reader, i, slots, make_policy(spec, ROWS)) for i in range(LAYERS)
        ]
        self.stream = RowStream(self.reader, ROWS)
        assert self.stream.capacity(0) == CHUNK

    def teardown(self) -> None:
        self.disk.broken.clear()
        for lazy, expected in self.promised:
            np.testing.assert_array_equal(np.array(lazy), expected)
        self.reader.close()
        self.stack.close()

    # What is right

    def block(self, layer: int, numbers: np.ndarray, part: str) -> np.ndarray:
        """Bytes of a part of some rows."""
        one = next(one for one in LAYOUT.parts if one.name == part)
        return self.blocks[layer][numbers, one.offset : one.offset + one.nbytes]

    def check(self, layer: int, numbers: np.ndarray, arrays: dict[str, mx.array]) -> list[mx.array]:
        """Arrays hold rows; returns lazy results of them, looked at when all is over."""
        found = []
        for part, array in arrays.items():
            expected = np.ascontiguousarray(self.block(layer, numbers, part)).view(np.uint32)
            np.testing.assert_array_equal(np.array(array.view(mx.uint32)), expected)
            found.append(array.view(mx.uint32) ^ mx.array(MASK, mx.uint32))
            self.promised.append((found[-1], expected ^ np.uint32(MASK)))
        return found

    def check_slots(self, layer: int, numbers: np.ndarray) -> None:
        slots = self.caches[layer].slots
        at = slots.slots_of(numbers)
        assert (at >= 0).all()
        for part, view in zip(LAYOUT.parts, slots.memory.views, strict=True):
            expected = self.block(layer, numbers, part.name)
            np.testing.assert_array_equal(view[at, : part.nbytes], expected)

    @invariant()
    def slots_hold_what_the_table_says(self) -> None:
        """Rows that are still on their way, or whose read has failed unnoticed, are not known."""
        for layer, cache in enumerate(getattr(self, "caches", ())):
            cache.slots.table.check(np.sort(cache.slots.rows()))
            unknown = [
                row
                for row, reads in cache.reads.early.items()
                if not all(read.done() and not read.exception() for read in reads)
            ]
            self.check_slots(layer, np.setdiff1d(cache.slots.rows(), unknown))

    @contextlib.contextmanager
    def step(self, layer: int, wanted: np.ndarray) -> Iterator[RowCache]:
        """A step that may fail where the disk does; the layer's cache is empty after that."""
        cache = self.caches[layer]
        held, hits = set(cache.slots.rows().tolist()), cache.counters.hits
        try:
            yield cache
        except (ReadError, Interrupt) as error:
            assert isinstance(error, Interrupt) or layer in self.suspicious
            assert cache.slots.table.num_used == 0
            assert not cache.reads.early
            self.clear_suspicion()
        else:
            assert cache.counters.hits - hits == len(held & set(wanted.tolist()))

    def clear_suspicion(self) -> None:
        for layer, cache in enumerate(self.caches):
            broken = any(i == layer for i, _ in self.disk.broken)
            if not broken and not cache.reads.early and self.in_buffer != layer:
                self.suspicious.discard(layer)

    # What may happen to the disk

    @rule(layer=layers, numbers=rows(4))
    def break_rows(self, layer: int, numbers: np.ndarray) -> None:
        self.disk.broken |= {(layer, row) for row in numbers.tolist()}
        self.suspicious.add(layer)

    @rule()
    def mend(self) -> None:
        self.disk.broken.clear()
        self.clear_suspicion()

    # What FFNs do

    @rule(layer=layers, wanted=rows())
    def fetch(self, layer: int, wanted: np.ndarray) -> None:
        with self.step(layer, wanted) as cache:
            inside = cache.fetch(wanted)
            assert inside.sum() == min(wanted.size, cache.slots.capacity)
            assert (cache.slots.slots_of(wanted) >= 0).tolist() == inside.tolist()
            self.check_slots(layer, wanted[inside])

    @rule(layer=layers, wanted=rows())
    def fetch_and_compute_from_all_slots(self, layer: int, wanted: np.ndarray) -> None:
        """As under a window; rows that were prefetched are not there for certain, so not then."""
        with self.step(layer, wanted) as cache:
            cache.fetch(wanted)
            slots = cache.slots
            assert np.array(slots.index()).tolist() == slots.rows().tolist()
            if not cache.reads.early:
                arrays = {name: slots.part(name) for name in slots.memory.arrays}
                slots.retain_until_evaluated(*self.check(layer, slots.rows(), arrays))

    @rule(layer=layers, wanted=rows(), interrupted=st.booleans())
    def compute_while_the_rest_comes(
        self, layer: int, wanted: np.ndarray, interrupted: bool
    ) -> None:
        wanted = wanted[: self.caches[layer].slots.capacity]
        with self.step(layer, wanted) as cache, cache.invalidate_on_error():
            loading = cache.begin(wanted)
            self.check_slots(layer, np.setdiff1d(wanted, loading))
            if interrupted:
                raise Interrupt
            cache.finish()
            self.check_slots(layer, wanted)

    @rule(layer=layers, wanted=rows(CHUNK), interrupted=st.booleans())
    def gather(self, layer: int, wanted: np.ndarray, interrupted: bool) -> None:
        gathered = self.stream.gather(layer, wanted, self.caches[layer])
        with self.step(layer, wanted), gathered as (order, arrays):
            assert np.isin(wanted, order).all() and np.unique(order).size == order.size
            for lazy in self.check(layer, order, arrays):
                self.stream.retain_until_evaluated(lazy)
            if interrupted:
                raise Interrupt
        self.in_buffer = None

    @rule(layer=layers, wanted=rows(), pieces=st.integers(0, 3))
    def stream_through_slots(self, layer: int, wanted: np.ndarray, pieces: int) -> None:
        with self.step(layer, wanted) as cache:
            self.take_chunks(layer, wanted, cache, pieces)
        self.in_buffer = None

    @rule(layer=layers, wanted=rows(), pieces=st.integers(0, 3))
    def stream_past_slots(self, layer: int, wanted: np.ndarray, pieces: int) -> None:
        held = self.caches[layer].slots.rows().tolist()
        try:
            self.take_chunks(layer, wanted, None, pieces)
        except ReadError:
            assert layer in self.suspicious
        except Interrupt:
            pass
        assert self.caches[layer].slots.rows().tolist() == held
        self.in_buffer = None

    def take_chunks(
        self, layer: int, wanted: np.ndarray, cache: RowCache | None, pieces: int
    ) -> None:
        """Stop after some pieces, as an interrupted forward pass does; never for 0."""
        found: list[int] = []
        with contextlib.closing(self.stream.stream_chunks(layer, wanted, cache)) as chunks:
            for numbers, arrays in chunks:
                for lazy in self.check(layer, numbers, arrays):
                    self.stream.retain_until_evaluated(lazy)
                found += numbers.tolist()
                pieces -= 1
                if pieces == 0:
                    raise Interrupt
        assert found == wanted.tolist()

    # What prefetchers do

    @rule(layer=layers, predicted=rows())
    def prefetch_into_slots(self, layer: int, predicted: np.ndarray) -> None:
        cache = self.caches[layer]
        before = cache.slots.rows().tolist()
        cache.prefetch(predicted, self.gate)
        if cache.slots.policy.is_window:
            assert cache.slots.rows().tolist() == before
        else:
            assert (cache.slots.slots_of(predicted[: cache.slots.capacity]) >= 0).all()

    @rule(layer=layers, predicted=rows())
    def prefetch_into_a_buffer(self, layer: int, predicted: np.ndarray) -> None:
        held = [cache.slots.rows().tolist() for cache in self.caches]
        self.stream.prefetch(self.caches[layer], predicted, self.gate)
        assert [cache.slots.rows().tolist() for cache in self.caches] == held
        self.in_buffer = layer


TestPaging = Paging.TestCase
TestPaging.settings = settings(
    stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)

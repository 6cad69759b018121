"""Rows read into slots before they are asked for, whenever those reads end and however."""

import errno
import threading

import mlx.core as mx
import numpy as np
import pytest
from support.disks import slots_for
from support.expert_rows import EXPERT, ask, gated_reader
from support.slots import rows_of

from mlx_flash.errors import ReadError
from mlx_flash.paging.policies import LRU, SlidingWindow
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.storage.reader import BEHIND


@pytest.fixture
def gated(tmp_path, monkeypatch):
    with gated_reader(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def cache(gated):
    """(cache of three of the layer's nine rows, reader, gate, the layer's bytes)."""
    reader, gate, layers = gated
    return RowCache(reader, 2, 3, LRU(9), unpadded=True), reader, gate, layers[2]


def assert_holds(cache, block):
    for slot, row in enumerate(cache.slots.rows()):
        for part, view in zip(EXPERT.parts, cache.slots.memory.views, strict=True):
            expected = block[row, part.offset : part.offset + part.nbytes]
            assert np.array_equal(view[slot, : part.nbytes], expected), (row, part.name)


def hold(reader, gate):
    """A needed read that is under way until the gate's word: no read behind begins."""
    futures = ask(reader, 0, [1], [0], slots_for(EXPERT, 1))
    gate.begun.wait()
    return futures


def test_prefetched_rows_are_hits(cache):
    cache, reader, _, block = cache
    cache.fetch(rows_of(1))
    cache.prefetch(rows_of(1, 4, 7))
    counters = cache.counters
    assert (counters.prefetched, counters.prefetch_hits) == (2, 0), "what is there is not"
    assert cache.fetch(rows_of(4)).all()
    assert (cache.counters.prefetch_hits, cache.counters.hits, cache.counters.misses) == (1, 1, 1)
    cache.fetch(rows_of(7))
    assert cache.counters.prefetch_hits == 1, "a prefetch is for the next step"
    assert (cache.counters.hits, cache.counters.misses) == (2, 1)
    assert_holds(cache, block)
    assert reader.stats().bytes_read == 3 * EXPERT.stride


def test_prefetched_rows_that_are_not_read_yet(cache, monkeypatch):
    """Asked for anew where they wait behind needed reads; waited for where they are under way."""
    cache, reader, gate, block = cache
    busy = hold(reader, gate)
    begun, run_behind = threading.Semaphore(0), reader._run_behind

    def run(*args):
        begun.release()
        run_behind(*args)

    monkeypatch.setattr(reader, "_run_behind", run)
    cache.prefetch(rows_of(2, 3, 8))
    for _ in range(BEHIND):
        begun.acquire()
    asked, read, wait = [], cache.reads._submit, reader.wait

    def read_now(rows, *args, **kwargs):
        asked.extend(rows.tolist())
        return read(rows, *args, **kwargs)

    def wait_now(futures):
        gate.word.set()
        wait(futures)

    monkeypatch.setattr(cache.reads, "_submit", read_now)
    monkeypatch.setattr(reader, "wait", wait_now)
    cache.fetch(rows_of(2, 3, 8))
    wait(busy)
    assert len(asked) == 3 - BEHIND
    assert (cache.counters.prefetch_hits, cache.counters.hits, cache.counters.misses) == (3, 3, 0)
    assert_holds(cache, block)
    assert not cache.reads.early


def test_prefetched_rows_that_leave_before_they_are_read(cache, monkeypatch):
    """Nothing is written into a slot that has become another row's."""
    cache, reader, gate, block = cache
    busy = hold(reader, gate)
    cache.prefetch(rows_of(0, 1, 2))
    dropped, drop = [], reader.drop

    def drop_now(futures):
        dropped.append(len(futures))
        gate.word.set()
        drop(futures)
        assert all(future.done() for future in futures)

    monkeypatch.setattr(reader, "drop", drop_now)
    cache.prefetch(rows_of(3, 4, 5))
    assert dropped == [1, 1, 1]
    cache.fetch(rows_of(6, 7, 8))
    reader.wait(busy)
    assert (cache.counters.prefetched, cache.counters.prefetch_hits) == (6, 0)
    assert not cache.reads.early
    assert sorted(cache.slots.rows().tolist()) == [6, 7, 8]
    assert_holds(cache, block)


def test_prefetching_more_rows_than_slots(cache):
    cache, _, _, block = cache
    cache.prefetch(np.arange(9))
    assert cache.counters.prefetched == 3
    cache.fetch(rows_of(0, 1, 2))
    assert cache.counters.prefetch_hits == 3
    assert_holds(cache, block)


def test_prefetching_nothing(cache):
    cache, reader, _, _ = cache
    cache.prefetch(rows_of())
    assert cache.counters.prefetched == 0
    assert reader.stats().requests == 0


def test_nothing_is_prefetched_into_a_window(gated):
    """It holds what the last tokens used: nothing is read, and nothing counted."""
    reader, _, _ = gated
    cache = RowCache(reader, 2, 3, SlidingWindow(9, 2), unpadded=True)
    cache.prefetch(rows_of(1, 2))
    assert (cache.counters.prefetched, cache.slots.table.num_used) == (0, 0)
    cache.fetch(rows_of(1))
    assert (cache.counters.prefetch_hits, cache.counters.misses) == (0, 1)
    assert reader.stats().bytes_read == EXPERT.stride


def test_what_was_built_on_slots_is_done_before_rows_are_prefetched_into_them(cache):
    cache, _, _, block = cache
    cache.fetch(rows_of(0, 1, 2))
    slot = cache.slots.table.slot_of[0]
    total = cache.slots.memory.arrays["gate.weight"][slot].astype(mx.float32).sum()
    cache.slots.retain_until_evaluated(total)
    cache.prefetch(rows_of(3, 4, 5))
    for reads in cache.reads.early.values():
        cache.reads.reader.wait(reads)
    part = EXPERT.parts[0]
    expected = block[0, : part.nbytes].copy().view(np.uint32).astype(np.float32).sum()
    assert abs(total.item() / expected - 1) < 1e-5


def test_a_prefetched_read_that_fails(cache):
    """It is told when its row is needed; the cache is empty then, and works again."""
    cache, _, gate, block = cache
    real = gate.real

    def fail(_fd, _buffers, _offset):
        raise OSError(errno.EIO, "Input/output error")

    gate.real = fail
    cache.prefetch(rows_of(2, 5))
    for reads in cache.reads.early.values():
        with pytest.raises(ReadError):
            cache.reads.reader.wait(reads)
    gate.real = real
    with pytest.raises(ReadError, match=r"layer 2, row [25]"):
        cache.fetch(rows_of(2, 5))
    assert cache.slots.table.num_used == 0
    cache.fetch(rows_of(2, 5))
    assert_holds(cache, block)


def test_reserve_waits_for_what_was_prefetched(cache):
    cache, _, _, block = cache
    cache.prefetch(rows_of(1, 4))
    hit_slots, fill_slots = cache.reserve(rows_of(0, 1, 4, 6, 8))
    assert (hit_slots >= 0).tolist() == [False, True, True, False, False]
    assert (fill_slots >= 0).sum() == 1
    for row, slot in zip((1, 4), hit_slots[1:3], strict=True):
        part = EXPERT.parts[0]
        found = cache.slots.memory.views[0][slot, : part.nbytes]
        assert np.array_equal(found, block[row, : part.nbytes])

"""A cache on a real row file: slots hold their rows, whatever fails."""

import errno
import os
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from support.fake_kernel import FakeKernel, use
from support.row_files import make
from support.slots import Stubborn, active_sets, rows_of

from mlx_flash.errors import CacheError, ReadError
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.paging.policies import LFU, SlidingWindow
from mlx_flash.paging.slots import slot_store as module
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import RowLayout

FFN_LAYOUTS = {
    f"{dtype} {mode}": RowLayout.plan(["up", "down"], dtype, width)
    for dtype, widths in {
        "F32": {"staged": 64, "scattered": 1024, "padded": 1026},
        "BF16": {"staged": 64, "scattered": 2048, "padded": 2050},
    }.items()
    for mode, width in widths.items()
}
ROWS = 40


@pytest.fixture(params=FFN_LAYOUTS)
def layout(request) -> RowLayout:
    return FFN_LAYOUTS[request.param]


@pytest.fixture
def opened(tmp_path, layout):
    """(reader, dense matrix of each part in float32) of a file with two layers."""
    file, layers = make(tmp_path / "rows", layout, [3, ROWS])
    dense = {
        p.name: as_float(layers[1][:, p.offset : p.offset + p.nbytes], p.dtype)
        for p in layout.parts
    }
    with closing(RowReader(file, threads=4)) as reader:
        yield reader, dense


def numpy_of(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def as_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    raw = np.ascontiguousarray(raw)
    return raw.view(np.float32) if dtype == "F32" else numpy_of(mx.array(raw).view(mx.bfloat16))


def cached_part(cache: RowCache, name: str, width: int) -> np.ndarray:
    return numpy_of(cache.slots.part(name))[:, :width]


def assert_slots_hold(cache: RowCache, dense: dict[str, np.ndarray]) -> None:
    for name, matrix in dense.items():
        part = cached_part(cache, name, matrix.shape[1])
        np.testing.assert_array_equal(part, matrix[cache.slots.rows()])


def test_scattering_is_tested_both_ways():
    assert {name.split()[1] for name, layout in FFN_LAYOUTS.items() if layout.scatters} == {
        "scattered",
        "padded",
    }


def test_the_used_prefix_is_the_rows(opened):
    reader, dense = opened
    rng = np.random.default_rng(0)
    cache = RowCache(reader, 1, 15, SlidingWindow(ROWS, 3))
    hits = misses = moves = 0
    for active in active_sets(rng, ROWS, 15, 200):
        there = np.isin(active, cache.slots.rows()).sum()
        hits, misses = hits + int(there), misses + int(active.size - there)
        old = cache.slots.rows()
        assert cache.fetch(active).all()
        new = cache.slots.rows()
        assert cache.slots.table.num_used == new.size == cache.slots.part("up").shape[0]
        assert set(active.tolist()) <= set(new.tolist())
        both = np.intersect1d(old, new)
        moves += sum(old.tolist().index(r) != new.tolist().index(r) for r in both)
        assert_slots_hold(cache, dense)
    assert (cache.counters.hits, cache.counters.misses) == (hits, misses)
    assert moves > 10
    assert reader.stats().requests > 0


def test_rows_are_a_copy(opened):
    reader, dense = opened
    cache = RowCache(reader, 1, 15, SlidingWindow(ROWS))
    cache.fetch(rows_of(1, 2, 3))
    cache.slots.rows()[:] = 0
    assert_slots_hold(cache, dense)
    assert cache.slots.rows().tolist() == [1, 2, 3]


def test_a_relu_ffn_over_the_prefix_is_the_dense_one(opened, layout):
    reader, dense = opened
    dtype, width = layout.parts[0].dtype, layout.parts[0].width
    rng = np.random.default_rng(1)
    cache = RowCache(reader, 1, ROWS - 6, SlidingWindow(ROWS, 3))
    up, down = (mx.array(dense[name]).astype(DTYPES[dtype]) for name in ("up", "down"))
    extra = 0
    x = rng.standard_normal((1, width)).astype(np.float32)
    for _ in range(25):
        x = 0.7 * x + 0.7 * rng.standard_normal((1, width)).astype(np.float32)
        hidden = mx.array(x).astype(DTYPES[dtype])
        before = hidden @ up.T
        expected = mx.maximum(before, 0) @ down
        active = np.flatnonzero(numpy_of(before)[0] > 0)
        assert cache.fetch(active).all()
        used = cache.slots.table.num_used
        extra += used - active.size
        padding = cache.slots.part("up").shape[1] - width
        padded = mx.pad(hidden, [(0, 0), (0, padding)])
        y = (mx.maximum(padded @ cache.slots.part("up").T, 0) @ cache.slots.part("down"))[:, :width]
        cache.slots.retain_until_evaluated(y)
        close = {"rtol": 1e-4, "atol": 1e-3} if dtype == "F32" else {"rtol": 2e-2, "atol": 2}
        np.testing.assert_allclose(numpy_of(y), numpy_of(expected), **close)
        scale = np.abs(numpy_of(expected)).mean()
        assert np.abs(numpy_of(y) - numpy_of(expected)).mean() < 0.01 * scale
    assert extra > 100, "no rows were cached beyond the active ones"


def test_what_was_built_is_evaluated_before_slots_change(opened):
    """Lazy results of many steps keep their values, whether slots are overwritten or moved."""
    reader, dense = opened
    rng = np.random.default_rng(2)
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS, 2))
    built = []
    for active in active_sets(rng, ROWS, 8, 120):
        cache.fetch(active)
        lazy = [cache.slots.part(name) * 2 for name in dense]
        cache.slots.retain_until_evaluated(*lazy)
        built.append((cache.slots.rows(), lazy))
    for rows, lazy in built:
        for matrix, y in zip(dense.values(), lazy, strict=True):
            np.testing.assert_array_equal(numpy_of(y)[:, : matrix.shape[1]], 2 * matrix[rows])


def test_moved_slots_alone_evaluate_what_was_built(opened):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS, 1))
    cache.fetch(rows_of(1, 2, 3, 4))
    y = cache.slots.part("up") * 2
    cache.slots.retain_until_evaluated(y)
    cache.fetch(rows_of(4))
    assert cache.slots.rows().tolist() == [4]
    width = dense["up"].shape[1]
    np.testing.assert_array_equal(numpy_of(y)[:, :width], 2 * dense["up"][1:5])
    assert_slots_hold(cache, dense)


def test_hits_alone_evaluate_nothing_and_keep_little(opened, monkeypatch):
    reader, _ = opened
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS))
    evaluated = []
    monkeypatch.setattr(module.mx, "eval", lambda arrays: evaluated.append(len(arrays)))
    cache.fetch(rows_of(1, 2, 3))
    evaluated.clear()
    for _ in range(10):
        cache.fetch(rows_of(1, 2, 3))
        cache.slots.retain_until_evaluated(mx.zeros(1))
    assert not evaluated
    for _ in range(1000):
        cache.fetch(rows_of(1, 2, 3))
        cache.slots.retain_until_evaluated(mx.zeros(1))
        assert len(cache.slots._retained) < 100, "results pile up while every row is a hit"
    assert sum(evaluated) + len(cache.slots._retained) == 1010


def fail(_fd: int, _buffers: list[memoryview], _offset: int) -> int:
    raise OSError(errno.EIO, "Input/output error")


def test_a_failed_read_leaves_an_empty_cache(opened, monkeypatch):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS, 3))
    cache.fetch(rows_of(1, 2, 3))
    lazy = cache.slots.part("up") * 2
    cache.slots.retain_until_evaluated(lazy)
    rows = cache.slots.rows()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        use(patch, FakeKernel())
        with pytest.raises(ReadError, match="layer 1, row 7"):
            cache.fetch(rows_of(2, 7))
    assert (cache.counters.hits, cache.counters.misses) == (1, 3)
    assert cache.slots.part("up").shape[0] == cache.slots.rows().size == 0
    width = dense["up"].shape[1]
    np.testing.assert_array_equal(numpy_of(lazy)[:, :width], 2 * dense["up"][rows])
    for active in (rows_of(2, 7), rows_of(), rows_of(0, 9, 39)):
        cache.fetch(active)
        assert set(active.tolist()) <= set(cache.slots.rows().tolist())
        assert_slots_hold(cache, dense)
    assert cache.counters.misses == 3 + 2 + 3


def test_a_failed_evaluation_leaves_an_empty_cache(opened, monkeypatch):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS))
    cache.fetch(rows_of(1, 2, 3))
    bad = mx.zeros(1)
    cache.slots.retain_until_evaluated(bad)
    real = mx.eval

    def broken(arrays: list[mx.array]) -> None:
        if any(array is bad for array in arrays):
            raise RuntimeError("out of memory")
        real(arrays)

    monkeypatch.setattr(module.mx, "eval", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fetch(rows_of(4))
    assert not cache.slots.rows().size
    cache.fetch(rows_of(2, 4))  # what failed is not tried for ever
    assert cache.slots.rows().tolist() == [2, 4]
    assert_slots_hold(cache, dense)


def test_what_is_there_can_be_used_while_the_rest_comes(opened, monkeypatch):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, LFU(ROWS))
    cache.fetch(rows_of(1, 2, 3))
    submit, begun = reader.submit, []
    monkeypatch.setattr(reader, "submit", lambda *args: begun.append(args) or [])
    assert sorted(cache.begin(rows_of(2, 3, 7, 9)).tolist()) == [7, 9]
    cache.finish()
    monkeypatch.undo()
    reader.wait(submit(*begun[0]))
    assert (cache.counters.hits, cache.counters.misses) == (2, 5)
    assert_slots_hold(cache, dense)
    cache.prefetch(rows_of(20, 21))
    assert set(cache.begin(rows_of(1, 20)).tolist()) <= {20}  # unless it has come already
    cache.finish()
    assert not cache.begin(rows_of(1, 20)).size
    cache.finish()
    cache.fetch(rows_of(21))
    assert_slots_hold(cache, dense)


def test_failure_between_begin_and_finish_leaves_an_empty_cache(opened):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, LFU(ROWS))
    with pytest.raises(MemoryError), cache.invalidate_on_error():
        cache.begin(rows_of(1, 2))
        raise MemoryError
    assert not cache.slots.rows().size
    cache.begin(rows_of(4))
    cache.finish()
    assert_slots_hold(cache, dense)


def test_more_rows_than_slots(opened):
    """What is there stays, the others pass by."""
    reader, dense = opened
    cache = RowCache(reader, 1, 4, SlidingWindow(ROWS, 2))
    cache.fetch(rows_of(1, 2, 3))
    assert cache.fetch(np.arange(6)).tolist() == [True, True, True, True, False, False]
    assert sorted(cache.slots.rows().tolist()) == [0, 1, 2, 3]
    assert (cache.counters.hits, cache.counters.misses) == (3, 4)
    assert_slots_hold(cache, dense)


def test_small_and_large_capacity(opened):
    reader, dense = opened
    one = RowCache(reader, 1, 1, SlidingWindow(ROWS))
    for row in (5, 5, 0, 39):
        assert one.fetch(rows_of(row)).all()
        assert one.slots.rows().tolist() == [row]
        assert_slots_hold(one, dense)
    everything = RowCache(reader, 1, 10**9, SlidingWindow(ROWS, 10**9))
    assert everything.slots.table.capacity == ROWS
    assert everything.fetch(np.arange(ROWS)).all()
    assert everything.slots.table.num_used == ROWS
    assert_slots_hold(everything, dense)
    assert everything.fetch(rows_of()).size == 0
    assert everything.slots.table.num_used == ROWS
    with pytest.raises(CacheError):
        RowCache(reader, 1, 0, SlidingWindow(ROWS))


def test_a_policy_of_ones_own(opened):
    reader, dense = opened
    cache = RowCache(reader, 1, 5, Stubborn(0.0, leave=True))
    for active in (rows_of(1, 2, 3), rows_of(3, 9)):
        cache.fetch(active)
        assert sorted(cache.slots.rows().tolist()) == active.tolist()
        assert_slots_hold(cache, dense)

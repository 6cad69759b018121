"""Slots: bookkeeping against a model of it, policies, memory, and a cache on a real row file."""

import copy
import errno
import os
from collections.abc import Callable
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from support.fake_kernel import FakeKernel, use
from support.row_files import make

from mlx_flash.errors import CacheError, FlashError, ReadError
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.paging import row_cache as module
from mlx_flash.paging.policies import LFU, LRU, Policy, SlidingWindow
from mlx_flash.paging.row_cache import RowCache
from mlx_flash.paging.slot_memory import SlotMemory, aligned_bytes
from mlx_flash.paging.slot_table import SlotTable
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import PAGE, Part, RowLayout

POLICIES: dict[str, Callable[[int], Policy]] = {
    "window of 1": lambda rows: SlidingWindow(rows, 1),
    "window of 3": lambda rows: SlidingWindow(rows, 3),
    "endless window": lambda rows: SlidingWindow(rows, 10**6),
    "lru": LRU,
    "lfu": LFU,
    "lfu of half-life 2": lambda rows: LFU(rows, 2),
}


def rows_of(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def active_sets(rng: np.random.Generator, rows: int, capacity: int, steps: int):
    """Random active sets as they come in practice: hot rows, repeats, sometimes none or many."""
    heat = rng.random(rows) ** 4
    last = rows_of()
    for _ in range(steps):
        if last.size and rng.random() < 0.2:
            yield last
            continue
        share = rng.choice([0.0, 0.3, 1.0, 3.0])
        last = np.flatnonzero(rng.random(rows) < heat * share)
        if last.size > capacity:
            last = np.sort(rng.choice(last, capacity, replace=False))
        yield last


def assert_sound(table: SlotTable, active: np.ndarray) -> None:
    used = table.num_used
    assert 0 <= used <= table.capacity
    assert (table.row_in[:used] >= 0).all(), "a hole in the prefix"
    assert (table.row_in[used:] == -1).all()
    cached = np.flatnonzero(table.slot_of >= 0)
    assert cached.size == used
    assert (table.row_in[table.slot_of[cached]] == cached).all()
    assert (table.slot_of[active] >= 0).all(), "an active row is not there"


def assert_carried_out(before: np.ndarray, update, table: SlotTable) -> None:
    """Slots that held ``before`` hold what the table says after moves, then loads."""
    slots = before.copy()
    slots[update.move_to] = slots[update.move_from]
    slots[update.load_slots] = update.load_rows
    assert slots[: table.num_used].tolist() == table.row_in[: table.num_used].tolist()
    assert not np.intersect1d(update.move_from, update.move_to).size
    assert not np.intersect1d(update.load_slots, update.move_to).size
    assert (np.diff(update.load_rows) > 0).all()


# Bookkeeping


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("rows", "capacity"), [(1, 1), (30, 1), (30, 8), (30, 29), (200, 70)])
def test_policies_conform(policy, rows, capacity):
    """What every policy must keep to, whichever rows it lets go."""
    rng = np.random.default_rng(0)
    table, mine = SlotTable(rows, capacity), policy(rows)
    twin_table, twin = SlotTable(rows, capacity), policy(rows)
    slots = np.full(capacity, -1)
    for active in active_sets(rng, rows, capacity, 200):
        was_there = table.slot_of[active] >= 0
        cached_before = set(table.row_in[: table.num_used].tolist())
        before = active.copy()
        update = table.update(active, mine)
        assert_sound(table, active)
        assert_carried_out(slots, update, table)
        assert update.load_rows.tolist() == active[~was_there].tolist()
        assert update.hits == was_there.sum()
        assert set(table.row_in[: table.num_used].tolist()) <= cached_before | set(active.tolist())
        slots = table.row_in.astype(np.int64)

        cached = table.row_in[: table.num_used].copy()
        state = copy.deepcopy(vars(mine))
        for answer, kind in ((mine.expired, "b"), (mine.rank, "biuf")):
            first, again = np.asarray(answer(cached)), np.asarray(answer(cached))
            assert first.shape == cached.shape and first.dtype.kind in kind
            assert not np.isnan(first).any()
            np.testing.assert_array_equal(first, again)
        assert_same_state(state, vars(mine))
        assert active.tolist() == before.tolist()

        twin_table.update(active, twin)
        assert twin_table.row_in.tolist() == table.row_in.tolist(), "not deterministic"


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(
    "active",
    [
        rows_of(0, 1, 2, 3, 4),
        rows_of(2, 1),
        rows_of(1, 1),
        rows_of(-1, 2),
        rows_of(3, 30),
        np.array([2, 1], np.uint32),
        np.array([1.0, 2.0]),
        np.array([True, False]),
        rows_of(1, 2)[None],
    ],
    ids=str,
)
def test_a_refused_update_changes_nothing(policy, active):
    table, mine = SlotTable(30, 4), policy(30)
    for step in ([1, 2], [2, 7], [9]):
        table.update(np.array(step), mine)
    before_table, before_policy = copy.deepcopy(vars(table)), copy.deepcopy(vars(mine))
    with pytest.raises(CacheError) as info:
        table.update(active, mine)
    assert isinstance(info.value, FlashError)
    assert_same_state(before_table, vars(table))
    assert_same_state(before_policy, vars(mine))


def test_too_many_rows_says_how_many():
    table = SlotTable(30, 4)
    with pytest.raises(CacheError, match="5 rows are active at once, the cache has 4 slots"):
        table.update(np.arange(5), SlidingWindow(30, 2))


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize(("rows", "capacity"), [(40, 40), (40, 12), (40, 1), (300, 60)])
def test_the_window_holds_what_the_last_tokens_used(window, rows, capacity):
    """The paper's: the union of the rows of the last k tokens, as far as there is room."""
    rng = np.random.default_rng(window)
    table, policy = SlotTable(rows, capacity), SlidingWindow(rows, window)
    history: list[set[int]] = []
    last_use: dict[int, int] = {}
    cached: set[int] = set()
    fitted = pressed = 0
    for step, active in enumerate(active_sets(rng, rows, capacity, 1200)):
        needed = set(active.tolist())
        history.append(needed)
        last_use |= dict.fromkeys(needed, step)
        stays = cached & set().union(*history[-window:])
        table.update(active, policy)
        found = set(table.row_in[: table.num_used].tolist())
        assert found == set(np.flatnonzero(table.slot_of >= 0).tolist())
        if len(stays | needed) <= capacity:
            fitted += 1
            assert found == stays | needed
        else:
            pressed += 1
            gone = stays - found
            assert not gone & needed, "an active row was evicted"
            assert len(found) == capacity and found <= stays | needed, "evicted more than needed"
            assert max(last_use[r] for r in gone) <= min(
                (last_use[r] for r in found - needed), default=step
            ), "not the longest unused"
        cached = found
    assert fitted > 200
    assert capacity == rows or window == 1 or pressed > 50


def test_with_room_the_window_is_exactly_the_union():
    rng = np.random.default_rng(0)
    for window in (1, 2, 3, 7):
        table, policy = SlotTable(60, 60), SlidingWindow(60, window)
        history: list[set[int]] = []
        for active in active_sets(rng, 60, 60, 500):
            history.append(set(active.tolist()))
            table.update(active, policy)
            union = set().union(*history[-window:])
            assert set(table.row_in[: table.num_used].tolist()) == union


def test_the_window_step_by_step():
    table, policy = SlotTable(10, 5), SlidingWindow(10, 2)
    first = table.update(rows_of(1, 4, 7), policy)
    assert first.load_rows.tolist() == [1, 4, 7] and first.load_slots.tolist() == [0, 1, 2]
    second = table.update(rows_of(4, 9), policy)
    assert (second.hits, second.load_rows.tolist()) == (1, [9])
    assert table.row_in.tolist() == [1, 4, 7, 9, -1]
    third = table.update(rows_of(9), policy)  # 1 and 7 leave; the end of the prefix fills in
    assert (third.hits, third.load_rows.tolist()) == (1, [])
    assert (third.move_from.tolist(), third.move_to.tolist()) == ([3], [0])
    assert table.row_in.tolist() == [9, 4, -1, -1, -1]
    fourth = table.update(rows_of(2, 3), policy)  # 4 leaves, a new row takes its place
    assert fourth.load_slots.tolist() == [1, 2] and not fourth.move_to.size
    assert table.row_in.tolist() == [9, 2, 3, -1, -1]


def test_a_token_without_active_rows_counts():
    table, policy = SlotTable(10, 5), SlidingWindow(10, 2)
    table.update(rows_of(1, 2), policy)
    update = table.update(rows_of(), policy)
    assert (update.hits, table.num_used, update.load_rows.size) == (0, 2, 0)
    table.update(rows_of(), policy)
    assert table.num_used == 0


def test_capacity_of_one():
    table, policy = SlotTable(10, 1), SlidingWindow(10, 4)
    for row in [3, 3, 5, 0, 9, 9]:
        update = table.update(rows_of(row), policy)
        assert table.row_in.tolist() == [row]
        assert update.move_to.size == 0
    table.update(rows_of(), policy)
    assert table.row_in.tolist() == [9]


class Stubborn(Policy):
    """Says of every row that it must stay, or that it may go, however active it is."""

    def __init__(self, rank: float, leave: bool) -> None:
        self._rank, self._leave = rank, leave
        self.is_window = leave

    def used(self, rows: np.ndarray) -> None:
        pass

    def expired(self, rows: np.ndarray) -> np.ndarray:
        mask = np.full(rows.shape, self._leave)
        mask.flags.writeable = False
        return mask

    def rank(self, rows: np.ndarray) -> np.ndarray:
        return np.full(rows.shape, self._rank)


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("rank", [0.0, np.inf, -np.inf])
def test_no_policy_can_evict_active_rows(rank, leave):
    rng = np.random.default_rng(0)
    table, policy = SlotTable(40, 10), Stubborn(rank, leave)
    for active in active_sets(rng, 40, 10, 300):
        table.update(active, policy)
        assert_sound(table, active)
        if leave:
            assert table.num_used == active.size


def test_senseless_sizes_are_refused():
    for capacity in (0, -1):
        with pytest.raises(CacheError, match="at least one slot"):
            SlotTable(10, capacity)
    for window in (0, -3):
        with pytest.raises(CacheError, match="at least one token"):
            SlidingWindow(10, window)


# Memory


@pytest.mark.parametrize("nbytes", [1, 2, 511, 4096, 100_001])
@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint16, mx.uint32])
def test_aligned_memory_is_shared(nbytes, dtype):
    array, view = aligned_bytes(nbytes, dtype)
    assert view.dtype == np.uint8 and view.ctypes.data % PAGE == 0
    assert nbytes <= view.size == array.nbytes < nbytes + dtype.size
    assert not view.any()
    view[:] = np.arange(view.size) % 251
    expected = (np.arange(view.size) % 251).astype(np.uint8)
    assert array.view(mx.uint8).tolist() == expected.tolist()
    total = expected.view({1: "u1", 2: "u2", 4: "u4"}[dtype.size]).sum(dtype=np.uint64)
    assert array.astype(mx.uint64).sum().item() == total


def test_memory_too_large_for_mlx_is_refused(monkeypatch):
    with pytest.raises(CacheError, match="more than one MLX array holds"):
        aligned_bytes(2**31)
    sizes = []

    def zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        sizes.append((shape, dtype))
        raise MemoryError

    monkeypatch.setattr(mx, "zeros", zeros)
    layout = RowLayout.plan(["up"], "BF16", 2048)
    with pytest.raises(MemoryError):
        SlotMemory(layout, 2**31 // 4096 + 1)  # more than 2 GiB of 2 byte numbers are fine
    ((shape, dtype),) = sizes
    assert shape[0] < 2**31 and dtype == mx.uint64


MEMORIES = {
    "staged": RowLayout.plan(["gate", "up", "down"], "BF16", 64),
    "pages": RowLayout.plan(["gate", "up", "down"], "F32", 1024),
    "padded": RowLayout.plan(["gate", "up", "down"], "F32", 1026),
    "unlike": RowLayout((Part("gate", "F32", (8,), 0), Part("up", "BF16", (50,), 32)), 512, 512),
}


def numpy_of(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("layout", MEMORIES.values(), ids=MEMORIES)
def test_what_is_written_through_views_is_what_mlx_sees(layout):
    memory = SlotMemory(layout, 7)
    assert memory.nbytes >= 7 * sum(layout.extents)
    assert memory.views[0].ctypes.data % PAGE == 0
    rng = np.random.default_rng(0)
    for _ in range(3):
        for part, extent, view in zip(layout.parts, layout.extents, memory.views, strict=True):
            array = memory.arrays[part.name]
            size = DTYPES[part.dtype].size
            assert array.dtype == DTYPES[part.dtype]
            assert array.shape == (7, extent // size) and view.shape == (7, extent)
            assert view.flags.carray
            values = rng.integers(-8, 8, array.shape).astype(np.float32)
            bits = values.view(np.uint16)[:, 1::2] if size == 2 else values
            view[:] = np.ascontiguousarray(bits).view(np.uint8)
        for part, view in zip(layout.parts, memory.views, strict=True):
            array = memory.arrays[part.name]
            found = numpy_of(array)
            raw = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
            assert np.array(array.view(raw)).tobytes() == view.tobytes()
            x = rng.integers(-2, 3, (2, array.shape[1])).astype(np.float32)
            product = mx.array(x).astype(array.dtype) @ array[:5].T
            np.testing.assert_allclose(numpy_of(product), x @ found[:5].T, rtol=1e-2, atol=4)


@pytest.mark.parametrize("layout", [v for k, v in MEMORIES.items() if k != "unlike"])
def test_joined_parts(layout):
    memory = SlotMemory(layout, 3)
    both = memory.joined("gate", "up")
    for i, view in enumerate(memory.views):
        view[:] = i + 1
    assert both.shape == (6, memory.arrays["gate"].shape[1])
    raw = {2: mx.uint16, 4: mx.uint32}[both.dtype.size]
    found = np.array(both.view(raw)).view(np.uint8)
    assert (found[:3] == 1).all() and (found[3:] == 2).all()
    assert memory.joined("gate", "up") is both
    for first, second in [("gate", "down"), ("up", "gate"), ("gate", "gate")]:
        with pytest.raises(CacheError, match="behind each other"):
            memory.joined(first, second)


def test_parts_unlike_are_not_joined():
    for second in (Part("up", "BF16", (16,), 32), Part("up", "F32", (9,), 32)):
        memory = SlotMemory(RowLayout((Part("gate", "F32", (8,), 0), second), 512, 512), 3)
        with pytest.raises(CacheError, match="behind each other"):
            memory.joined("gate", "up")


@pytest.mark.parametrize("layout", MEMORIES.values(), ids=MEMORIES)
def test_shared_memory(layout):
    large = SlotMemory(layout, 9)
    same, small = SlotMemory(layout, 9, share=large), SlotMemory(layout, 4, share=large)
    assert small.nbytes == same.nbytes == 0 < large.nbytes
    assert small.views[0].ctypes.data == large.views[0].ctypes.data
    for memory in (small, same, large):
        for i, (part, view) in enumerate(zip(layout.parts, memory.views, strict=True)):
            view[:] = i + memory.capacity
            found = np.array(memory.arrays[part.name].view(mx.uint8))
            assert (found == i + memory.capacity).all()
            assert found.shape == view.shape == (memory.capacity, layout.extents[i])
    assert (same.views[0] == large.views[0]).all()
    with pytest.raises(CacheError, match="cannot be shared"):
        SlotMemory(layout, 10, share=large)


# The cache on a row file

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


def as_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    raw = np.ascontiguousarray(raw)
    return raw.view(np.float32) if dtype == "F32" else numpy_of(mx.array(raw).view(mx.bfloat16))


def cached_part(cache: RowCache, name: str, width: int) -> np.ndarray:
    return numpy_of(cache.part(name))[:, :width]


def assert_slots_hold(cache: RowCache, dense: dict[str, np.ndarray]) -> None:
    for name, matrix in dense.items():
        part = cached_part(cache, name, matrix.shape[1])
        np.testing.assert_array_equal(part, matrix[cache.rows()])


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
        there = np.isin(active, cache.rows()).sum()
        hits, misses = hits + int(there), misses + int(active.size - there)
        old = cache.rows()
        assert cache.fetch(active).all()
        new = cache.rows()
        assert cache.table.num_used == new.size == cache.part("up").shape[0]
        assert set(active.tolist()) <= set(new.tolist())
        both = np.intersect1d(old, new)
        moves += sum(old.tolist().index(r) != new.tolist().index(r) for r in both)
        assert_slots_hold(cache, dense)
    assert (cache.hits, cache.misses) == (hits, misses)
    assert moves > 10
    assert reader.stats().requests > 0


def test_rows_are_a_copy(opened):
    reader, dense = opened
    cache = RowCache(reader, 1, 15, SlidingWindow(ROWS))
    cache.fetch(rows_of(1, 2, 3))
    cache.rows()[:] = 0
    assert_slots_hold(cache, dense)
    assert cache.rows().tolist() == [1, 2, 3]


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
        used = cache.table.num_used
        extra += used - active.size
        padding = cache.part("up").shape[1] - width
        padded = mx.pad(hidden, [(0, 0), (0, padding)])
        y = (mx.maximum(padded @ cache.part("up").T, 0) @ cache.part("down"))[:, :width]
        cache.retain_until_evaluated(y)
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
        lazy = [cache.part(name) * 2 for name in dense]
        cache.retain_until_evaluated(*lazy)
        built.append((cache.rows(), lazy))
    for rows, lazy in built:
        for matrix, y in zip(dense.values(), lazy, strict=True):
            np.testing.assert_array_equal(numpy_of(y)[:, : matrix.shape[1]], 2 * matrix[rows])


def test_moved_slots_alone_evaluate_what_was_built(opened):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS, 1))
    cache.fetch(rows_of(1, 2, 3, 4))
    y = cache.part("up") * 2
    cache.retain_until_evaluated(y)
    cache.fetch(rows_of(4))
    assert cache.rows().tolist() == [4]
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
        cache.retain_until_evaluated(mx.zeros(1))
    assert not evaluated
    for _ in range(1000):
        cache.fetch(rows_of(1, 2, 3))
        cache.retain_until_evaluated(mx.zeros(1))
        assert len(cache._built_on) < 100, "results pile up while every row is a hit"
    assert sum(evaluated) + len(cache._built_on) == 1010


def fail(_fd: int, _buffers: list[memoryview], _offset: int) -> int:
    raise OSError(errno.EIO, "Input/output error")


def test_a_failed_read_leaves_an_empty_cache(opened, monkeypatch):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS, 3))
    cache.fetch(rows_of(1, 2, 3))
    lazy = cache.part("up") * 2
    cache.retain_until_evaluated(lazy)
    rows = cache.rows()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        use(patch, FakeKernel())
        with pytest.raises(ReadError, match="layer 1, row 7"):
            cache.fetch(rows_of(2, 7))
    assert (cache.hits, cache.misses) == (1, 3)
    assert cache.part("up").shape[0] == cache.rows().size == 0
    width = dense["up"].shape[1]
    np.testing.assert_array_equal(numpy_of(lazy)[:, :width], 2 * dense["up"][rows])
    for active in (rows_of(2, 7), rows_of(), rows_of(0, 9, 39)):
        cache.fetch(active)
        assert set(active.tolist()) <= set(cache.rows().tolist())
        assert_slots_hold(cache, dense)
    assert cache.misses == 3 + 2 + 3


def test_a_failed_evaluation_leaves_an_empty_cache(opened, monkeypatch):
    reader, dense = opened
    cache = RowCache(reader, 1, 8, SlidingWindow(ROWS))
    cache.fetch(rows_of(1, 2, 3))
    bad = mx.zeros(1)
    cache.retain_until_evaluated(bad)
    real = mx.eval

    def broken(arrays: list[mx.array]) -> None:
        if any(array is bad for array in arrays):
            raise RuntimeError("out of memory")
        real(arrays)

    monkeypatch.setattr(module.mx, "eval", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fetch(rows_of(4))
    assert not cache.rows().size
    cache.fetch(rows_of(2, 4))  # what failed is not tried for ever
    assert cache.rows().tolist() == [2, 4]
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
    assert (cache.hits, cache.misses) == (2, 5)
    assert_slots_hold(cache, dense)
    cache.foretell(rows_of(20, 21))
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
    assert not cache.rows().size
    cache.begin(rows_of(4))
    cache.finish()
    assert_slots_hold(cache, dense)


def test_more_rows_than_slots(opened):
    """What is there stays, the others pass by."""
    reader, dense = opened
    cache = RowCache(reader, 1, 4, SlidingWindow(ROWS, 2))
    cache.fetch(rows_of(1, 2, 3))
    assert cache.fetch(np.arange(6)).tolist() == [True, True, True, True, False, False]
    assert sorted(cache.rows().tolist()) == [0, 1, 2, 3]
    assert (cache.hits, cache.misses) == (3, 4)
    assert_slots_hold(cache, dense)


@pytest.mark.parametrize("seed", range(20))
def test_what_passes_by(seed):
    """Nothing while there are slots enough; then what is not there and ranks lowest."""
    rng = np.random.default_rng(seed)
    table, policy = SlotTable(40, 10), LFU(40, 5)
    for active in active_sets(rng, 40, 40, 60):
        there = table.slot_of[active] >= 0
        inside = table.admit(active, policy)
        table.update(active[inside], policy, told=True)
        assert_sound(table, active[inside])
        assert inside.sum() == min(active.size, 10)
        assert inside[there].all(), "what is there and needed stays"
        if not inside.all():
            rank = policy.rank(active)
            entered = rank[inside & ~there]
            assert not entered.size or entered.min() >= rank[~inside].max()


def test_small_and_large_capacity(opened):
    reader, dense = opened
    one = RowCache(reader, 1, 1, SlidingWindow(ROWS))
    for row in (5, 5, 0, 39):
        assert one.fetch(rows_of(row)).all()
        assert one.rows().tolist() == [row]
        assert_slots_hold(one, dense)
    everything = RowCache(reader, 1, 10**9, SlidingWindow(ROWS, 10**9))
    assert everything.table.capacity == ROWS
    assert everything.fetch(np.arange(ROWS)).all()
    assert everything.table.num_used == ROWS
    assert_slots_hold(everything, dense)
    assert everything.fetch(rows_of()).size == 0
    assert everything.table.num_used == ROWS
    with pytest.raises(CacheError):
        RowCache(reader, 1, 0, SlidingWindow(ROWS))


def test_a_policy_of_ones_own(opened):
    reader, dense = opened
    cache = RowCache(reader, 1, 5, Stubborn(0.0, leave=True))
    for active in (rows_of(1, 2, 3), rows_of(3, 9)):
        cache.fetch(active)
        assert sorted(cache.rows().tolist()) == active.tolist()
        assert_slots_hold(cache, dense)

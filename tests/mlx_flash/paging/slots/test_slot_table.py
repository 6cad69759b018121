"""Which row is in which slot: the table against a model of it, under every policy."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
from support.slots import Stubborn, active_sets, rows_of

from mlx_flash.errors import CacheError, FlashError
from mlx_flash.paging.policies import LFU, LRU, Policy, SlidingWindow
from mlx_flash.paging.slots.slot_table import SlotTable

POLICIES: dict[str, Callable[[int], Policy]] = {
    "window of 1": lambda rows: SlidingWindow(rows, 1),
    "window of 3": lambda rows: SlidingWindow(rows, 3),
    "endless window": lambda rows: SlidingWindow(rows, 10**6),
    "lru": LRU,
    "lfu": LFU,
    "lfu of half-life 2": lambda rows: LFU(rows, 2),
}


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


def test_sizes_below_one_are_refused():
    for capacity in (0, -1):
        with pytest.raises(CacheError, match="at least one slot"):
            SlotTable(10, capacity)
    for window in (0, -3):
        with pytest.raises(CacheError, match="at least one token"):
            SlidingWindow(10, window)


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

"""Policies: what they keep, and that none beats the optimum."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from support.tiny import make_checkpoint
from support.trained import greedy

from mlx_flash import cli
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import CacheError
from mlx_flash.paging.policies import (
    LFU,
    LRU,
    POLICIES,
    Belady,
    Policy,
    PolicyKind,
    SlidingWindow,
    make_policy,
)
from mlx_flash.paging.slots.slot_table import SlotTable
from mlx_flash.runtime.load import load

ROWS = 60


def trace_of(seed, steps=80, rows=ROWS):
    """Rows with unlike heat, and a topic that drifts."""
    rng = np.random.default_rng(seed)
    heat = rng.random(rows) ** 5
    trace = []
    for step in range(steps):
        topic = np.exp(-(((np.arange(rows) - step / 2) % rows) ** 2) / 40)
        trace.append(np.flatnonzero(rng.random(rows) < np.maximum(heat, 0.6 * topic)))
    return trace


def hits(trace, policy, capacity, rows=ROWS):
    table = SlotTable(rows, capacity)
    return sum(table.update(active, policy).hits for active in trace)


def best(trace, capacity, rows):
    """Most hits of any way to choose what leaves, by trying all."""
    states = {frozenset(): 0}
    for active in (frozenset(step.tolist()) for step in trace):
        following: dict[frozenset, int] = {}
        for cached, count in states.items():
            others = cached - active
            free = capacity - len(active)
            gained = count + len(cached & active)
            for kept in itertools.combinations(sorted(others), min(free, len(others))):
                state = active | frozenset(kept)
                following[state] = max(following.get(state, 0), gained)
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(12))
def test_belady_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    trace = [np.flatnonzero(rng.random(8) < 0.25)[:3] for _ in range(12)]
    for capacity in (3, 4, 5):
        assert hits(trace, Belady(8, trace), capacity, 8) == best(trace, capacity, 8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [30, 40, 50])
def test_nobody_beats_belady(seed, capacity):
    trace = trace_of(seed)
    optimum = hits(trace, Belady(ROWS, trace), capacity)
    for name in POLICIES:
        assert 0 < hits(trace, make_policy(name, ROWS), capacity) <= optimum, name


def test_belady_knows_no_more_than_its_trace():
    policy = Belady(4, [np.array([1])])
    policy.used(np.array([1]))
    with pytest.raises(CacheError, match="1 steps"):
        policy.used(np.array([1]))


def test_lru_is_a_window_without_end():
    trace = trace_of(5)
    assert hits(trace, LRU(ROWS), 35) == hits(trace, SlidingWindow(ROWS, 10**6), 35)


def test_lfu_prefers_what_is_used_often():
    table, policy = SlotTable(10, 3), LFU(10)
    for rows in ([1], [1], [1], [2], [3], [4]):
        table.update(np.array(rows), policy)
    assert set(table.row_in.tolist()) == {1, 3, 4}


def test_lfu_forgets():
    table, policy = SlotTable(10, 2), LFU(10, half_life=1)
    for rows in ([1], [1], [1], [2], [2], [3], [2], [4]):
        table.update(np.array(rows), policy)
    assert set(table.row_in.tolist()) == {2, 4}


@pytest.mark.parametrize("half_life", [0, -1, float("nan")])
def test_half_lives_that_are_not_above_zero(half_life):
    with pytest.raises(CacheError, match="half-life"):
        LFU(3, half_life)


def test_specs():
    window, endless = make_policy("window:7", 5), make_policy("lfu:0.5", 5)
    assert isinstance(window, SlidingWindow) and window.window == 7
    assert make_policy("window", 5).window == 4
    assert isinstance(endless, LFU) and endless.half_life == 0.5
    assert [name for name in POLICIES if make_policy(name, 5).is_window] == ["window"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fifo", "'fifo'; expected one of window, lru, lfu"),
        ("", "''; expected one of window, lru, lfu"),
        ("window:0", "a window is at least one token, got 0"),
        ("window:", "'window:': expected a number behind the colon, as in 'window:4', got ''"),
        ("window:2.5", "expected a number behind the colon"),
        ("lru:4", "'lru:4': lru takes no number; leave ':4' out"),
        ("lfu:nan", "half-life"),
    ],
)
def test_specs_that_are_refused(spec, said):
    with pytest.raises(CacheError, match=re.escape(said)):
        make_policy(spec, 5)


class MostRecent(Policy):
    """The latest used leave first."""

    def __init__(self, rows, delay=0):
        self._last, self._step = np.zeros(rows), delay

    def used(self, rows):
        self._step += 1
        self._last[rows] = self._step

    def rank(self, rows):
        return -self._last[rows]


def test_a_new_policy_is_one_entry(monkeypatch, tmp_path):
    """Once it is in the table, everything that takes a policy by name takes it."""
    monkeypatch.setitem(POLICIES, "most-recent", PolicyKind(MostRecent, int))
    table, policy = SlotTable(9, 2), make_policy("most-recent:3", 9)
    for rows in ([1], [2], [3], [4]):
        table.update(np.array(rows), policy)
    assert sorted(table.row_in.tolist()) == [1, 4], "without a window nothing expires"
    source = make_checkpoint(tmp_path / "hf", "llama", "float32", hidden_act="relu")
    path = convert(source, tmp_path / "flash")
    model, _ = load(path, cache_share=0.2, policy="most-recent")
    expected, _ = load(path, use_flash=False)
    assert greedy(model, [5, 6, 7], 8) == greedy(expected, [5, 6, 7], 8)
    assert isinstance(model.flash.caches[0].slots.policy, MostRecent)
    with pytest.raises(SystemExit) as info:
        cli.main(["plan", "--model", str(path), "--policy", "newest"])
    assert info.value.code == 2


def test_rows_do_not_expire_without_a_window():
    class Wrong(LRU):
        def expired(self, rows):
            return np.ones(rows.shape, bool)

    table, policy = SlotTable(9, 3), Wrong(9)
    for rows in ([1], [2], [3]):
        table.update(np.array(rows), policy)
    assert sorted(table.row_in.tolist()) == [1, 2, 3]

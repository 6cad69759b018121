"""Experts in slots when reads fail, come late or are interrupted: tokens stay the same."""

import errno
import os
import threading
from concurrent.futures import Future

import pytest
from support.parity import LONG, PROMPT, assert_slots_hold_their_rows, greedy

from mlx_flash.errors import (
    ReadError,
)
from mlx_flash.paging.slots.pending_reads import PendingReads
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.paging.slots.slot_store import SlotStore
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions


class Failing:
    """os.preadv that fails once, at a call of so high a number."""

    def __init__(self):
        self.calls, self.failing, self.real = 0, 0, os.preadv

    def __call__(self, fd, buffers, offset):
        self.calls += 1
        if self.calls == self.failing:
            raise OSError(errno.EIO, "Input/output error")
        return self.real(fd, buffers, offset)

    def at(self, call):
        self.calls, self.failing = 0, call


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["slots", "rounds"])
def test_a_failing_read(made, reads, monkeypatch, prompt):
    """ReadError, wherever it strikes; what is called after it is right again."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.25))
    expected = greedy(dense, 12, prompt=prompt)
    monkeypatch.setattr(os, "preadv", failing := Failing())
    for call in (1, 7, 16):
        failing.at(call)
        with pytest.raises(ReadError, match=r"layer \d+, row \d+"):
            greedy(model, 12, prompt=prompt)
        assert greedy(model, 12, prompt=prompt) == expected
        assert_slots_hold_their_rows(model)
    model.flash.close()


def test_a_failing_read_that_was_prefetched(made, reads, monkeypatch):
    """It is told when its row is needed; of a row that is not, nobody needs to know."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.5, lookahead=True))
    expected = greedy(dense, 12)
    monkeypatch.setattr(os, "preadv", failing := Failing())
    told = 0
    for call in range(1, 30, 4):
        failing.at(call)
        for _ in range(2):
            try:
                assert greedy(model, 12) == expected
            except ReadError:
                told += 1
        failing.at(0)
        assert greedy(model, 12) == expected
        assert_slots_hold_their_rows(model)
    assert told
    model.flash.close()


# Prefetching


def test_lookahead(made, reads, monkeypatch):
    """The same tokens; what was prefetched and needed counts as useful, and as a hit."""
    directory, dense = made
    layers, gates, prefetch = set(), {}, RowCache.prefetch

    def recorded(cache, rows, gate):
        layers.add(cache.layer)
        gates[cache.layer] = gate
        prefetch(cache, rows, gate)

    monkeypatch.setattr(RowCache, "prefetch", recorded)
    model = load_model(directory, PagingOptions(cache_share=0.5, lookahead=True))
    assert greedy(model) == greedy(dense)
    stats = model.flash.stats()
    assert 0 < stats.useful <= stats.foretold
    assert stats.hits + stats.misses == stats.predicted
    stride = directory.rows.layout.stride
    assert stats.misses * stride < stats.bytes_read <= (stats.misses + stats.foretold) * stride
    assert assert_slots_hold_their_rows(model) == 4 * len(directory.rows.layers)
    assert layers == set(range(1, len(directory.rows.layers))), "nothing is before the first layer"
    right = sum(gate.right for gate in gates.values())
    assert stats.useful <= right <= sum(gate.predicted for gate in gates.values())
    assert all(gate.is_open and gate.steps for gate in gates.values())

    without = load_model(directory, PagingOptions(cache_share=0.5, lookahead=False))
    greedy(without)
    counted = without.flash.stats()
    assert (counted.foretold, counted.useful) == (0, 0)
    for loaded in (model, without):
        loaded.flash.close()


class Held:
    """In the place of the pool of reads behind: each waits for a word before it goes on.

    Args:
        begun: whether reads are under way while they wait; others can be cancelled.
    """

    def __init__(self, begun):
        self.begun, self.word = begun, threading.Event()
        self.asked = self.ran = self.cancelled = 0

    def submit(self, function, *args):
        future = Future()
        self.asked += 1
        if self.begun:
            future.set_running_or_notify_cancel()
        threading.Thread(target=self._run, args=(future, function, args), daemon=True).start()
        return future

    def _run(self, future, function, args):
        self.word.wait()
        if not self.begun and not future.set_running_or_notify_cancel():
            self.cancelled += 1
            return
        try:
            function(*args)
        except BaseException as error:
            future.set_exception(error)
        else:
            self.ran += 1
            future.set_result(None)

    def shutdown(self, wait):
        self.word.set()


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "share", [0.25, *(pytest.param(n, marks=pytest.mark.whole) for n in (0.375, 0.5))]
)
def test_prefetched_reads_that_are_late(made, reads, monkeypatch, share, begun):
    """A prefetch is not done when its row is needed, or when its row has left its slot.

    Reads behind are held until somebody waits for them: those that have not begun are asked for
    anew, those under way are waited for before their slot is used for anything else.
    """
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=share, lookahead=True))
    reader = model.flash.reader
    reader._behind.shutdown()
    held = reader._behind = Held(begun)
    late = {"needed": 0, "left": 0}
    real_drop, real_wait = reader.drop, reader.wait

    def let_go(futures, why):
        if begun and any(not future.done() for future in futures):
            late[why] += 1
            held.word.set()

    def drop(futures):
        if not begun:
            late["left"] += len(futures)
        let_go(futures, "left")
        real_drop(futures)
        held.word.clear()

    def wait(futures):
        let_go(futures, "needed")
        real_wait(futures)
        held.word.clear()

    monkeypatch.setattr(reader, "drop", drop)
    monkeypatch.setattr(reader, "wait", wait)
    assert greedy(model, 64) == greedy(dense, 64)
    stats = model.flash.stats()
    assert stats.foretold > 0
    assert stats.useful > 0
    assert stats.hits + stats.misses == stats.predicted
    assert held.asked == stats.foretold
    if begun:
        assert late["needed"]
    assert late["left"], "no prefetched row has left before it was read"
    held.word.set()
    assert assert_slots_hold_their_rows(model)
    model.flash.close()


# Interrupts

STEPS = {
    RowCache: ("_enter", "_place", "prefetch"),
    SlotStore: ("enter", "move"),
    PendingReads: ("claim", "settle", "_submit", "_wait"),
}


@pytest.mark.parametrize(
    "before", [True, pytest.param(False, marks=pytest.mark.whole)], ids=["before", "behind"]
)
@pytest.mark.parametrize("owner, step", [(o, step) for o in STEPS for step in STEPS[o]])
def test_interrupted_anywhere(made, reads, monkeypatch, owner, step, before):
    """Whatever step of fetching an interrupt strikes, what comes after it is right."""
    directory, dense = made
    real, left = getattr(owner, step), [0]

    def struck(self, *args, **kwargs):
        left[0] -= 1
        if before and left[0] == 0:
            raise KeyboardInterrupt
        found = real(self, *args, **kwargs)
        if not before and left[0] == 0:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, step, struck)
    model = load_model(directory, PagingOptions(cache_share=0.5, lookahead=True))
    expected = greedy(dense, 12)
    assert greedy(model, 12) == expected
    left[0] = 3
    with pytest.raises(KeyboardInterrupt):
        greedy(model, 12, prompt=[9, 8, 7, 77, 6])
    assert greedy(model, 12) == expected
    assert_slots_hold_their_rows(model)
    model.flash.close()

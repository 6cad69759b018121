"""Memory on huge pages: zeros stay zeros, what lies beside them is not touched."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from support.platforms import use_platform

from mlx_flash.common.platform import Platform
from mlx_flash.paging.slots.slot_memory import aligned_bytes
from mlx_flash.storage import huge_pages
from mlx_flash.storage.huge_pages import HUGE_PAGE, ask_for


def private(nbytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON), np.uint8)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has none")
def test_only_whole_huge_pages_inside_change():
    around = private(6 * HUGE_PAGE)
    around[:] = 7
    skip = -around.ctypes.data % HUGE_PAGE + 4096
    memory = around[skip : skip + 4 * HUGE_PAGE]
    if not ask_for(memory):
        pytest.skip("the kernel was built without them")
    changed = np.flatnonzero(around == 0)
    begin = skip - 4096 + HUGE_PAGE
    assert (changed[0], changed[-1] + 1) == (begin, begin + 3 * HUGE_PAGE)
    assert changed.size == 3 * HUGE_PAGE
    memory[:] = 5
    assert (memory == 5).all()
    assert (around[:skip] == 7).all()


def test_little_memory_stays_as_it_is():
    memory = private(HUGE_PAGE)[: HUGE_PAGE // 2]
    memory[:] = 7
    assert not ask_for(memory)
    assert (memory == 7).all()


def test_systems_without_them(monkeypatch):
    use_platform(monkeypatch, Platform())
    memory = private(4 * HUGE_PAGE)
    memory[:] = 7
    assert not huge_pages.ask_for(memory)
    assert (memory == 7).all()


def test_slots_are_zeros_that_both_sides_see():
    array, view = aligned_bytes(3 * HUGE_PAGE + 123)
    assert not view.any()
    view[:] = 9
    assert np.array(array, copy=False).min() == 9

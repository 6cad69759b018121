"""The simulator against caches that read: the same rows are missing, whatever the policy."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from support.row_files import make

from mlx_flash.paging import simulate
from mlx_flash.paging.policies import POLICIES, make_policy
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import RowLayout

ROWS = 40
LAYOUT = RowLayout.plan(["up", "down"], "F32", 64)


def trace(seed: int, steps: int = 60) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    heat = random.random(ROWS) ** 3
    return [np.flatnonzero(random.random(ROWS) < heat) for _ in range(steps)]


@pytest.mark.parametrize("slots", [1, 6, 20, 100])
@pytest.mark.parametrize("spec", [*POLICIES, "window:2"])
def test_misses_are_those_of_a_cache(tmp_path, spec, slots):
    """With fewer slots than active rows, too, some of which then pass by."""
    file, _ = make(tmp_path / "rows", LAYOUT, [ROWS])
    steps, expected = trace(slots), []
    with closing(RowReader(file, threads=1)) as reader:
        cache = RowCache(reader, 0, slots, make_policy(spec, ROWS))
        for step in steps:
            expected.append(np.setdiff1d(step, cache.slots.rows()).tolist())
            cache.fetch(step)
    policy = make_policy(spec, ROWS)
    assert [rows.tolist() for rows in simulate.misses(steps, ROWS, slots, policy)] == expected
    counts = simulate.miss_counts(steps, ROWS, slots, make_policy(spec, ROWS))
    assert counts.tolist() == [len(rows) for rows in expected]
    assert 0 < counts.sum() < sum(step.size for step in steps)


def test_no_steps():
    assert simulate.misses([], 5, 2, make_policy("lfu", 5)) == []
    assert simulate.miss_counts([], 5, 2, make_policy("lfu", 5)).shape == (0,)

"""Counting which rows were active."""

import numpy as np
import pytest

from mlx_flash.calibration.neurons import activity
from mlx_flash.paging.policies import SlidingWindow
from mlx_flash.paging.slots.slot_table import SlotTable


def text_of_rows(tokens=200, rows=60, seed=0):
    """Rows that come and go, some for several tokens in a row."""
    random = np.random.default_rng(seed)
    active = random.random((tokens, rows)) < 0.05
    return active | (np.roll(active, 1, axis=0) & (random.random((tokens, rows)) < 0.6))


def test_fresh_rows_are_what_the_cache_would_read():
    active = text_of_rows()
    found = activity.fresh_rows(active)
    for window in activity.WINDOWS:
        table, policy = SlotTable(active.shape[1], active.shape[1]), SlidingWindow(60, window)
        read = [table.update(np.flatnonzero(row), policy).load_rows.size for row in active]
        assert found[str(window)] == pytest.approx(np.mean(read[max(activity.WINDOWS) :]))
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_union_sizes():
    active = text_of_rows()
    found = activity.union_sizes(active)
    assert found["1"] == pytest.approx(active.sum(axis=1).mean())
    unions = [active[i : i + 4].any(axis=0).sum() for i in range(0, 200, 4)]
    assert found["4"] == pytest.approx(np.mean(unions))
    assert list(activity.union_sizes(active[:5])) == ["1", "2", "4"]


def test_compare_counts():
    active = np.array([[1, 1, 0, 0], [0, 0, 1, 0]], bool)
    predicted = np.array([[1, 0, 1, 0], [0, 0, 1, 1]], bool)
    strength = active * np.array([3.0, 1.0, 2.0, 5.0])
    found = activity.compare(predicted, active, strength)
    assert found["sparsity"] == 5 / 8
    assert (found["active"], found["predicted"]) == (1.5, 2.0)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["weighted_recall"] == pytest.approx(5 / 6)
    assert found["false_positive_rate"] == pytest.approx(2 / 5)
    assert found["predicted_per_active"] == pytest.approx(4 / 3)
    assert found["output_error"] == pytest.approx((1 / 14) ** 0.5)
    nothing = activity.compare(predicted, np.zeros_like(active), np.zeros(active.shape))
    assert nothing["recall"] == 1.0
    assert nothing["output_error"] == 0.0

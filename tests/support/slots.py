"""Shared by tests of slots: random steps as they come in practice, and a stubborn policy."""

import numpy as np

from mlx_flash.paging.policies import Policy


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

"""Which cached rows leave: the paper's sliding window, LRU, LFU with ageing, and the optimum.

To add a policy, write a class that derives from ``Policy`` and enter it in ``POLICIES``: the
command line, ``load``, the forecasts and the tests of all policies find it there. ``Belady`` is
not entered: it knows the whole trace beforehand. It is the yardstick that no policy can beat (L. A.
Belady, IBM Systems Journal 5(2), 1966).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_flash.errors import CacheError

DEFAULT_WINDOW = 4  # tokens, as in the paper
HALF_LIFE = 128.0  # steps; did best on trained models (benchmarks/storage/policies.py)


class Policy(Protocol):
    """Which cached rows leave. Rows are int arrays; a step is one call of ``used``.

    What a policy answers depends on what was used, not on what is in slots. Active rows never
    leave, whatever a policy says of them.

    Attributes:
        is_window: rows leave when they are ``expired``, even where there is room, so the slots
            hold the rows of the last steps and no others. Of any other policy ``expired`` is not
            asked. Slots under a window are computed from as a whole, without gathering (see
            ``Prefix``), and nothing is prefetched into them.
    """

    is_window: bool = False

    def used(self, rows: np.ndarray) -> None:
        """These rows are active in the step that begins now."""

    def expired(self, rows: np.ndarray) -> np.ndarray:
        """Of cached rows, a bool mask of those that leave even where there is room."""
        return np.zeros(rows.shape, bool)

    def rank(self, rows: np.ndarray) -> np.ndarray:
        """Of any rows, a number each: the smallest leave first where room is needed."""


class LRU(Policy):
    """The longest unused leave first, and only where room is needed."""

    def __init__(self, rows: int) -> None:
        self._step = 0
        self._last = np.full(rows, -1, np.int64)

    def used(self, rows: np.ndarray) -> None:
        self._step += 1
        self._last[rows] = self._step

    def rank(self, rows: np.ndarray) -> np.ndarray:
        return self._last[rows]


class SlidingWindow(LRU):
    """Rows active in one of the last ``window`` steps stay; the longest unused leave first.

    LLM in a flash, section 3.1.
    """

    is_window = True

    def __init__(self, rows: int, window: int = DEFAULT_WINDOW) -> None:
        if window < 1:
            raise CacheError(f"a window is at least one token, got {window}")
        super().__init__(rows)
        self.window = window

    def expired(self, rows: np.ndarray) -> np.ndarray:
        return self._last[rows] <= self._step - self.window


class LFU(Policy):
    """The least used leave first; a use counts half after ``half_life`` steps.

    A row's count outlives its stay in the cache.
    """

    def __init__(self, rows: int, half_life: float = HALF_LIFE) -> None:
        if not half_life > 0:
            raise CacheError(f"a half-life is more than 0 steps, got {half_life}")
        self.half_life = half_life
        self._step = 0
        self._rate = np.log(2) / half_life
        self._count = np.zeros(rows)
        self._last = np.zeros(rows, np.int64)

    def used(self, rows: np.ndarray) -> None:
        self._step += 1
        self._count[rows] = 1 + self.rank(rows)
        self._last[rows] = self._step

    def rank(self, rows: np.ndarray) -> np.ndarray:
        return self._count[rows] * np.exp(self._rate * (self._last[rows] - self._step))


class Belady(Policy):
    """The rows that are needed again last leave first; ``trace`` holds every step to come.

    The optimum where every active row takes a slot.
    """

    def __init__(self, rows: int, trace: Sequence[np.ndarray]) -> None:
        self._steps = len(trace)
        self._step = -1
        who = np.concatenate([np.asarray(step, np.int64) for step in trace] or [np.zeros(0, int)])
        when = np.repeat(np.arange(len(trace)), [len(step) for step in trace])
        order = np.lexsort((when, who))
        self._uses = np.append(when[order], self._steps)  # of row 0 in order, then of row 1, ...
        bounds = np.searchsorted(who[order], np.arange(rows + 1))
        self._at, self._stop = bounds[:-1].copy(), bounds[1:]

    def used(self, rows: np.ndarray) -> None:
        self._step += 1
        if self._step >= self._steps:
            raise CacheError(f"the trace has {self._steps} steps, this is one more")
        self._at[rows] += 1

    def rank(self, rows: np.ndarray) -> np.ndarray:
        at = self._at[rows]
        return -np.where(at < self._stop[rows], self._uses[at], self._steps)


@dataclass(frozen=True)
class PolicyKind:
    """An entry of ``POLICIES``.

    Args:
        make: rows of a layer, and the number of the spec where there is one -> policy.
        number: text behind the colon of a spec -> the number; None where a policy takes none.
    """

    make: Callable[..., Policy]
    number: Callable[[str], Any] | None = None


POLICIES: dict[str, PolicyKind] = {
    "window": PolicyKind(SlidingWindow, int),
    "lru": PolicyKind(LRU),
    "lfu": PolicyKind(LFU, float),
}
DEFAULT_POLICY = "lfu"  # the most hits in benchmarks/storage/policies.py


def make_policy(spec: str, rows: int) -> Policy:
    """A policy for a layer of ``rows`` rows.

    Args:
        spec: a name of ``POLICIES``, with a colon and a number where the policy takes one:
            "lru", "window:4" (tokens), "lfu:64" (half-life, steps). Without the number it has its
            default.

    Raises:
        CacheError: there is no such policy, or it cannot have that number.
    """
    name, colon, text = spec.partition(":")
    if name not in POLICIES:
        raise CacheError(f"policy {spec!r}; expected one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    if not colon:
        return kind.make(rows)
    if kind.number is None:
        raise CacheError(f"policy {spec!r}: {name} takes no number; leave {colon + text!r} out")
    try:
        number = kind.number(text)
    except ValueError as error:
        raise CacheError(
            f"policy {spec!r}: expected a number behind the colon, as in 'window:4', got {text!r}"
        ) from error
    return kind.make(rows, number)

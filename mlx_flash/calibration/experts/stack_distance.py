"""How many uses find their row in a cache, for any number of slots, and what to make of it.

All policies of ``policy`` rank rows by what was used, whatever the number of slots, and the slots
of a smaller cache are then a part of those of a larger one (stack algorithms: Mattson et al., IBM
Systems Journal 9(2), 1970). So one pass over a trace tells for each use how many slots it would
have taken to find the row: its depth. The hits at every capacity follow.

Slots are shared out over layers one by one, each to the layer where it saves the most misses per
byte, along the lower convex envelope of the layer's misses: what a stretch of slots saves together
counts for each of them.

Knows: traces (for each step the rows used, sorted, distinct), policies, curves. Does not know:
files, models, MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from mlx_flash.paging.policies import Policy

Trace = Sequence[np.ndarray]
NEVER = np.iinfo(np.int32).max  # depth of a use that no cache would have had


def depths(trace: Trace, rows: int, policy: Policy) -> list[np.ndarray]:
    """For each step, the slots it takes for each of its rows to be a hit; ``NEVER`` the first time.

    What ``SlotTable`` does under a policy whose rows do not expire, with any number of slots.
    """
    stack: list[int] = []
    everything = np.arange(rows)
    found = []
    for active in trace:
        place = {row: i for i, row in enumerate(stack)}
        found.append(np.array([place.get(row, NEVER - 1) + 1 for row in active.tolist()], np.int64))
        policy.used(active)
        stack = _restack(stack, active.tolist(), np.asarray(policy.rank(everything)).tolist())
    return found


def _restack(stack: list[int], active: list[int], rank: list[float]) -> list[int]:
    """The stack after a step: its first n rows are those in a cache of n slots, for any n.

    With fewer slots than active rows, those that are there stay and the best of the others enter;
    with more, all active rows are there and of the others those that the policy ranks highest.
    """
    wanted = set(active)
    entering = sorted(active, key=lambda row: -rank[row])
    placed: dict[int, None] = {}
    waiting: list[tuple[float, int]] = []
    for i in range(len(active)):
        there = stack[i] if i < len(stack) else -1
        if there in wanted and there not in placed:
            placed[there] = None
        else:
            placed[next(row for row in entering if row not in placed)] = None
        if there >= 0 and there not in wanted:
            heappush(waiting, (-rank[there], there))
    after = list(placed)
    for i in range(len(active), len(stack)):
        if not waiting:
            return after + stack[i:]  # all active rows lay above: the rest is as it was
        if stack[i] not in wanted:
            heappush(waiting, (-rank[stack[i]], stack[i]))
        after.append(heappop(waiting)[1])
    while waiting:
        after.append(heappop(waiting)[1])
    return after


def misses(depth: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """Misses per step with 0, 1, ... ``rows`` slots."""
    flat = np.concatenate(depth)
    counts = np.bincount(np.minimum(flat, rows + 1), minlength=rows + 2)
    return (flat.size - np.cumsum(counts)[: rows + 1]) / len(depth)


def within(depth: Sequence[np.ndarray], trace: Trace, window: int) -> list[np.ndarray]:
    """Depths under a window: what was last used more than so many steps ago was let go.

    Args:
        depth: those of LRU.
    """
    last: dict[int, int] = {}
    found = []
    for step, (deep, active) in enumerate(zip(depth, trace, strict=True)):
        ago = [step - last.get(row, -NEVER) for row in active.tolist()]
        found.append(np.where(np.array(ago) > window, NEVER, deep))
        last.update(dict.fromkeys(active.tolist(), step))
    return found

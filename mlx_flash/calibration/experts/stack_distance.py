"""Stack distances: hits and misses of a trace for every number of slots, in one pass over it.

All policies of ``paging.policies`` rank rows by what was used, whatever the number of slots. The
rows in a smaller cache are then a subset of those in a larger one (stack algorithms: Mattson et
al., IBM Systems Journal 9(2), 1970). So one pass over a trace gives the stack distance of each
access, the smallest number of slots at which it is a hit, and from these the miss-ratio curve. A
trace lists for each step the rows used, sorted and distinct.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from mlx_flash.paging.policies import Policy

Trace = Sequence[np.ndarray]
NEVER = np.iinfo(np.int32).max  # distance of an access that misses at every number of slots


def depths(trace: Trace, rows: int, policy: Policy) -> list[np.ndarray]:
    """Stack distance of every access: the smallest number of slots at which it hits.

    That is for a ``SlotTable`` under a policy whose rows do not expire.

    Returns:
        For each step int64 [rows used]; ``NEVER`` at a row's first use.
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

    With fewer slots than active rows, active rows in slots stay and the best of the others enter.
    With more, all active rows are in slots, and of the others those that the policy ranks highest.
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
    """Stack distances under a sliding window: ``NEVER`` where the last use is too long ago.

    Args:
        depth: stack distances of LRU.
        window: steps after which an unused row leaves.
    """
    last: dict[int, int] = {}
    found = []
    for step, (deep, active) in enumerate(zip(depth, trace, strict=True)):
        ago = [step - last.get(row, -NEVER) for row in active.tolist()]
        found.append(np.where(np.array(ago) > window, NEVER, deep))
        last.update(dict.fromkeys(active.tolist(), step))
    return found

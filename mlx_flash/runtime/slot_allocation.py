"""Sharing slots out over layers by what each is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def envelope(curve: Sequence[float]) -> np.ndarray:
    """The largest convex curve that is nowhere above this one, which must not rise."""
    corners: list[int] = []
    for x in range(len(curve)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (curve[b] - curve[a]) * (x - a) < (curve[x] - curve[a]) * (b - a):
                break
            corners.pop()
        corners.append(x)
    return np.interp(np.arange(len(curve)), corners, [curve[x] for x in corners])


def allocate_slots(
    curves: Sequence[Sequence[float]],
    sizes: Sequence[int],
    least: Sequence[int],
    room: int,
) -> tuple[int, ...]:
    """Slots of each layer, so that misses are few.

    Args:
        curves: of each layer, misses with 0, 1, ... slots, not rising.
        sizes: of each layer, bytes of a slot.
        least: of each layer, slots that it gets in any case.
        room: bytes for all.
    """
    gains, shares, owners = [], [], []
    for layer, (curve, size, first) in enumerate(zip(curves, sizes, least, strict=True)):
        hull = envelope(curve[first:])
        gains.append(-np.diff(hull) / size)
        shares.append(np.arange(first, first + hull.size - 1) / max(1, len(curve) - 1))
        owners.append(np.full(hull.size - 1, layer))
    owner = np.concatenate(owners)
    # Where nothing more is gained, as the text never asked, layers fill up evenly. Rounded, for on
    # a straight stretch the gains of one slot and the next differ by what floats do.
    gain = np.round(np.concatenate(gains) * max(sizes), 9)
    order = np.lexsort((owner, np.concatenate(shares), -gain))
    spent = np.cumsum(np.asarray(sizes)[owner[order]])
    left = room - sum(n * size for n, size in zip(least, sizes, strict=True))
    taken = owner[order][: np.searchsorted(spent, left, side="right")]
    counts = np.bincount(taken, minlength=len(curves))
    return tuple(int(n + more) for n, more in zip(least, counts, strict=True))

"""An order of a layer's rows in which few requests read the rows that a token needs.

Rows that are needed by the same tokens are put next to each other, so that one request reads
several of them. From the strongest pair down, pairs of rows are linked unless one of them has two
neighbours already or the link would close a ring. The result is chains, the most used first (the
greedy Hamiltonian path of Neuralink, arXiv 2410.19274). LLM in a flash bundled each row with its
closest friend instead, and read the hottest rows again and again; here no row is stored twice, and
hot rows are in slots and not read at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_flash.storage.read_requests import plan_scattered

NEIGHBOURS = 32  # pairs that are considered of each row
TOKENS_AT_ONCE = 512
ROWS_AT_ONCE = 1024


def by_coactivation(active: np.ndarray) -> np.ndarray:
    """The row to put at each place, int64 [rows].

    Args:
        active: bool [tokens, rows], what each token asks for.
    """
    uses = active.sum(axis=0)
    chains = _chains(_linked(*_pairs(active, uses)), active.shape[1])
    often = np.array([uses[chain].mean() for chain in chains])
    return np.concatenate([chains[i] for i in np.argsort(-often, kind="stable")])


def is_order(order: np.ndarray, rows: int) -> bool:
    """Whether every row of a layer is at exactly one place."""
    return order.shape == (rows,) and bool((np.sort(order) == np.arange(rows)).all())


def places(order: np.ndarray) -> np.ndarray:
    """Where each row is put: the inverse of an order."""
    found = np.empty(order.size, np.int64)
    found[order] = np.arange(order.size)
    return found


def _pairs(active: np.ndarray, uses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs [n, 2] that are asked for together, strongest first, and rows that are never used.

    The strength of a pair is how often both are asked for over the geometric mean of how often each
    is, so that what is always on does not look close to everything.
    """
    rows = active.shape[1]
    count = min(NEIGHBOURS, rows - 1)
    weight = 1 / np.sqrt(uses + 1.0, dtype=np.float32)
    found, strengths = [], []
    for start in range(0, rows if count else 0, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        together = np.zeros((stop - start, rows), np.float32)
        for at in range(0, len(active), TOKENS_AT_ONCE):
            some = active[at : at + TOKENS_AT_ONCE].astype(np.float32)
            together += some[:, start:stop].T @ some
        together *= weight * weight[start:stop, None]
        own = np.arange(start, stop)
        together[own - start, own] = 0
        best = np.argpartition(-together, count - 1, axis=1)[:, :count]
        first = np.repeat(own, count)
        found.append(np.stack([first, best.reshape(-1)], axis=1))
        strengths.append(together[first - start, best.reshape(-1)])
    if not found:
        return np.zeros((0, 2), np.int64), np.zeros(rows)
    pairs, strength = np.concatenate(found), np.concatenate(strengths)
    strong = np.flatnonzero(strength > 0)
    strong = strong[np.lexsort((*pairs[strong].T[::-1], -strength[strong]))]
    return pairs[strong], uses


def _linked(pairs: np.ndarray, uses: np.ndarray) -> list[list[int]]:
    """The neighbours of each row, at most two, without rings."""
    neighbours: list[list[int]] = [[] for _ in range(uses.size)]
    end = list(range(uses.size))  # of the chain that a row is an end of, the other end
    for a, b in pairs.tolist():
        if len(neighbours[a]) < 2 and len(neighbours[b]) < 2 and end[a] != b:
            neighbours[a].append(b)
            neighbours[b].append(a)
            far, other = end[a], end[b]
            end[far], end[other] = other, far
    return neighbours


def _chains(neighbours: list[list[int]], rows: int) -> list[np.ndarray]:
    """The chains from end to end, each begun at its end with the lower number."""
    seen = np.zeros(rows, bool)
    found = []
    for first in range(rows):
        if seen[first] or len(neighbours[first]) == 2:
            continue
        chain, row = [first], first
        seen[first] = True
        while following := [other for other in neighbours[row] if not seen[other]]:
            row = following[0]
            seen[row] = True
            chain.append(row)
        found.append(np.array(chain))
    return found


@dataclass(frozen=True)
class Reads:
    """What a token's reads of one layer amount to, on average."""

    rows: float
    requests: float
    bytes: float


def reads(
    wanted: Sequence[np.ndarray],
    order: np.ndarray,
    stride: int,
    gap: int,
    request_bytes: int,
    skipped: int = 0,
) -> Reads:
    """What reading some rows takes in an order.

    Args:
        wanted: for each token the rows that are read.
        order: see ``by_coactivation``.
        stride: bytes from one row to the next.
        gap: unwanted rows read along to join two requests.
        request_bytes: a request is at most this long, or one row.
        skipped: bytes at the ends of a request that are not read, see ``scatter_list.span``.
    """
    place = places(order)
    most = max(1, request_bytes // stride)
    requests = nbytes = 0
    for rows in wanted:
        few, long = plan_scattered(np.sort(place[rows]), max_rows=most, gap=gap)
        found = few + long
        requests += len(found)
        nbytes += stride * sum(request.stop - request.start for request in found)
        nbytes -= skipped * len(found)
    count = max(1, len(wanted))
    return Reads(sum(rows.size for rows in wanted) / count, requests / count, nbytes / count)

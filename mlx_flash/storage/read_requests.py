"""Sorted row numbers to contiguous reads, near rows joined. Pure.

Knows: numbers. Does not know: bytes, files, memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# What a request takes besides its bytes, and how fast bytes come, many at a time; of the Linux disk
# measured, 10.0 us and 1.62 GB/s (benchmarks/storage/row_order.py), made to join across 16 KiB.
REQUEST_SECONDS, BYTES_PER_SECOND = 10e-6, 1.64e9

SCATTER_ROWS = 8  # a request of more rows is staged: a request of many pieces is a slow one
# Of a staged request so much is wanted: handing it to a thread takes as long as several others.
STAGED_SHARE = 0.5


def gap_bytes(
    request_seconds: float = REQUEST_SECONDS, bytes_per_second: float = BYTES_PER_SECOND
) -> int:
    """How many unwanted bytes are read in the time that one more request takes."""
    if not (request_seconds >= 0 and bytes_per_second > 0):
        raise ValueError(
            f"a request takes {request_seconds} s and a byte 1 / {bytes_per_second} s: "
            "expected times that are not negative"
        )
    return int(request_seconds * bytes_per_second)


class Request(NamedTuple):
    """One contiguous read: rows ``start`` to ``stop`` of a layer.

    ``first`` and ``last`` delimit, in the sorted list given to ``plan``, the wanted rows in it.
    Where one row is read in several requests, ``begin`` and ``end`` say which of its bytes.
    """

    start: int
    stop: int
    first: int
    last: int
    begin: int = 0
    end: int = 0


def plan(rows: np.ndarray, *, max_rows: int, gap: int = 0) -> list[Request]:
    """Turn sorted, distinct row numbers into contiguous reads.

    Args:
        rows: int array [n], strictly increasing.
        max_rows: a read spans at most this many rows, gaps included.
        gap: up to this many unwanted rows are read along to save a request.
    """
    if max_rows < 1 or gap < 0:
        raise ValueError(f"max_rows must be at least 1 and gap at least 0, got {max_rows}, {gap}")
    if rows.size == 0:
        return []
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"rows must be an int array [n], got {rows.dtype} {rows.shape}")
    if rows[0] < 0 or bool((rows[1:] <= rows[:-1]).any()):
        raise ValueError("rows must be distinct, sorted and not negative")
    breaks = np.flatnonzero(np.diff(rows) > gap + 1) + 1
    firsts, lasts = np.append(0, breaks), np.append(breaks, rows.size)
    starts, stops = rows[firsts], rows[lasts - 1] + 1
    found = zip(*(a.tolist() for a in (starts, stops, firsts, lasts)), strict=True)
    requests: list[Request] = []
    for run in (Request(*numbers) for numbers in found):
        if run.stop - run.start <= max_rows:
            requests.append(run)
            continue
        first = run.first
        while first < run.last:
            start = int(rows[first])
            cut = first + int(np.searchsorted(rows[first : run.last], start + max_rows))
            requests.append(Request(start, int(rows[cut - 1]) + 1, first, cut))
            first = cut
    return requests


def plan_scattered(
    rows: np.ndarray, *, max_rows: int, gap: int = 0, few_gap: int | None = None
) -> tuple[list[Request], list[Request]]:
    """Like ``plan``, in two kinds: (requests of few rows to be scattered, long ones to be staged).

    Where gaps would make a long one of which little is wanted, fewer rows are joined instead.

    Args:
        rows, max_rows, gap: see ``plan``.
        few_gap: ``gap`` of scattered requests; None for the same.
    """
    few_gap = gap if few_gap is None else few_gap
    few: list[Request] = []
    long: list[Request] = []
    for request in plan(rows, max_rows=max_rows, gap=gap):
        span = request.stop - request.start
        wanted = request.last - request.first
        if wanted == span or (span > SCATTER_ROWS and wanted >= STAGED_SHARE * span):
            (few if span <= SCATTER_ROWS else long).append(request)
        else:
            for piece in _split(request, rows, few_gap):
                (few if piece.stop - piece.start <= SCATTER_ROWS else long).append(piece)
    return few, long


def _split(request: Request, rows: np.ndarray, gap: int) -> list[Request]:
    """A request in such that span at most ``SCATTER_ROWS``; runs of wanted rows stay whole."""
    wanted = rows[request.first : request.last]
    breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
    firsts, lasts = np.append(0, breaks), np.append(breaks, wanted.size)
    bounds = (wanted[firsts], wanted[lasts - 1] + 1, firsts + request.first, lasts + request.first)
    found: list[Request] = []
    for run in (Request(*numbers) for numbers in zip(*(b.tolist() for b in bounds), strict=True)):
        before = found[-1] if found else None
        if before and run.start - before.stop <= gap and run.stop - before.start <= SCATTER_ROWS:
            found[-1] = before._replace(stop=run.stop, last=run.last)
        else:
            found.append(run)
    return found


def cut(request: Request, begin: int, end: int, nbytes: int, grain: int) -> list[Request]:
    """Bytes ``begin`` to ``end`` of a request's single row, in about equal pieces.

    Args:
        nbytes: a piece is at most this long, or one grain.
        grain: pieces begin at multiples of this.
    """
    most = max(grain, nbytes // grain * grain)
    count = -(-(end - begin) // most)
    step = -(-(end - begin) // (count * grain)) * grain
    ends = [*range(begin + step, end, step), end]
    return [
        request._replace(begin=at, end=stop)
        for at, stop in zip([begin, *ends[:-1]], ends, strict=True)
    ]


def as_slice(index: np.ndarray) -> slice | np.ndarray:
    """A run of consecutive numbers as a slice, which copies without an index array."""
    first = int(index[0])
    if int(index[-1]) - first == index.size - 1 and bool((np.diff(index) == 1).all()):
        return slice(first, first + index.size)
    return index

"""Where the bytes of scattered requests go, for all requests of a read at once.

Knows: row numbers, slots, addresses. Does not know: files, who reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from .aio import IOVEC
from .read_plan import Request


def as_array(requests: Sequence[Request]) -> np.ndarray:
    """Requests as a record array of int64, field by field."""
    numbers = np.fromiter(chain.from_iterable(requests), np.int64)
    return numbers.view([(name, np.int64) for name in Request._fields])


def vectors(
    requests: np.ndarray,
    rows: np.ndarray,
    slots: np.ndarray,
    pieces: Sequence[tuple[memoryview | None, int]],
    stride: int,
    sink: memoryview,
) -> tuple[np.ndarray, np.ndarray]:
    """The memory of requests, in the order of the file: (IOVEC array, where each one's begin).

    Args:
        requests: as ``as_array`` makes it, not empty.
        rows, slots: of the read, which ``first`` and ``last`` of the requests point into.
        pieces: of a row that is wanted, so many bytes each into a memory, slot after slot, or, with
            None, into the sink.
        stride: from one row to the next.
        sink: takes a row that is not wanted, and what the pieces leave out of one.
    """
    counts = requests["last"] - requests["first"]
    ends = np.cumsum(counts)
    begins = ends - counts  # of the requests, among the rows that they want
    if ends[-1] == rows.size:
        wanted, where = rows.astype(np.int64, copy=False), slots.astype(np.int64, copy=False)
    else:
        index = np.arange(ends[-1]) + np.repeat(requests["first"] - begins, counts)
        wanted, where = rows[index].astype(np.int64), slots[index].astype(np.int64)
    between = stride - sum(nbytes for _, nbytes in pieces)
    # Before each row but a request's first: what is left of the row before, and rows left out.
    before = np.zeros(wanted.size, np.int64)
    if wanted.size > begins.size:
        before[1:] = np.diff(wanted) - 1 + (between > 0)
        before[begins] = 0
    sizes = before + len(pieces)
    lasts = np.cumsum(sizes)
    found = np.empty(lasts[-1], IOVEC)
    address, nbytes = found["address"], found["nbytes"]
    nowhere = _address(sink)
    if lasts[-1] > wanted.size * len(pieces):
        address[:], nbytes[:] = nowhere, stride
        if between:
            rest = (lasts - sizes)[before > 0]
            nbytes[rest] = between
    at = lasts - len(pieces)
    for i, (memory, size) in enumerate(pieces):
        address[at + i] = nowhere if memory is None else _address(memory) + where * size
        nbytes[at + i] = size
    return found, (lasts - sizes)[begins]


def _address(memory: memoryview) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data

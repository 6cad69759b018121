"""A read made ready: which bytes of which rows go where in memory.

Knows: one layout, row numbers, slots, memory. Does not know: files, threads, who issues it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from .linux_aio import IOVEC
from .read_requests import Request
from .row_layout import RowLayout


@dataclass
class PreparedRead:
    """Requests of one set of rows into one set of slots, ready to be issued again and again.

    Of each row the bytes from ``first`` to ``last`` are read. ``pieces`` says where those go, piece
    by piece: (memory of a part, slot after slot, or None for nowhere; bytes of each row).
    """

    layout: RowLayout
    rows: np.ndarray
    slots: np.ndarray
    out: Sequence[np.ndarray | None]
    pieces: list[tuple[memoryview | None, int]]
    scattered: list[Request]
    staged: list[Request]
    first: int
    last: int


def prepare(
    layout: RowLayout,
    rows: np.ndarray,
    slots: np.ndarray,
    out: Sequence[np.ndarray | None],
    grain: int = 1,
) -> PreparedRead:
    """A read of ``rows`` so that row ``rows[i]`` lands in slot ``slots[i]``, without requests yet.

    Args:
        rows: int array [n], strictly increasing.
        slots: int array [n], distinct.
        out: for each part a uint8 array [capacity, extent of the part]; what a slot holds between
            and behind the numbers of a part is then the padding in the file. None for a part that
            is not wanted; where the layout scatters it is not read, if it is the first or the last.
        grain: where the layout scatters, the parts' memory starts on multiples of this.
    """
    held = []
    for part, extent, array in zip(layout.parts, layout.extents, out, strict=True):
        if array is None:
            continue
        held.append(array)
        plain = array.dtype == np.uint8 and array.flags.carray
        if not plain or array.shape[1:] != (extent,):
            raise ValueError(
                f"memory for part {part.name} is {array.dtype} {array.shape}, "
                f"expected writable uint8 [capacity, {extent}] without gaps"
            )
        if layout.scatters and array.ctypes.data % grain:
            raise ValueError(f"memory for part {part.name} does not start on a sector")
    if not held:
        raise ValueError("no part of the rows is wanted")
    capacity = min(map(len, held))
    if slots.shape != rows.shape or bool(((slots < 0) | (slots >= capacity)).any()):
        raise ValueError(f"slots for {rows.size} rows must be as many, from 0 to {capacity}")
    first, last = span(layout, out)
    pieces: list[tuple[memoryview | None, int]] = []
    offset = 0
    for array, extent in zip(out, layout.extents, strict=True):
        if first <= offset < last:
            flat = None if array is None else memoryview(array.reshape(-1))
            pieces.append((flat, extent))
        offset += extent
    if last > offset:
        pieces.append((None, last - offset))
    return PreparedRead(layout, rows, slots, out, pieces, [], [], first, last)


def span(layout: RowLayout, out: Sequence[np.ndarray | None]) -> tuple[int, int]:
    """From which to which byte of a row the wanted parts lie."""
    if not layout.scatters:
        return 0, layout.stride
    wanted = [i for i, array in enumerate(out) if array is not None]
    extents = layout.extents
    if wanted[-1] == len(out) - 1:  # padding behind the last part lets requests be joined
        return sum(extents[: wanted[0]]), layout.stride
    return sum(extents[: wanted[0]]), sum(extents[: wanted[-1] + 1])


def iovec(read: PreparedRead, request: Request, sink: memoryview) -> list[memoryview]:
    """Where the bytes of a request go, in the order of the file.

    ``sink`` takes a row that is not wanted, and what the pieces leave out of one.
    """
    stride = read.layout.stride
    found: list[memoryview] = []
    at = request.start
    for i in range(request.first, request.last):
        if found:
            if between := stride - (read.last - read.first):
                found += _nowhere(sink, between)
            found += [sink[:stride]] * (int(read.rows[i]) - at)
        slot = int(read.slots[i])
        for memory, nbytes in read.pieces:
            begin = slot * nbytes
            if memory is None:
                found += _nowhere(sink, nbytes)
            else:
                found.append(memory[begin : begin + nbytes])
        at = int(read.rows[i]) + 1
    if request.end:
        return _between(found, request.begin - read.first, request.end - read.first)
    return found


def where(base: int, read: PreparedRead, request: Request) -> tuple[int, int]:
    """Offset in the file and length of a request."""
    begin, end = request.begin, request.end
    if not end:
        begin = read.first
        end = (request.stop - request.start - 1) * read.layout.stride + read.last
    return base + request.start * read.layout.stride + begin, end - begin


def _nowhere(sink: memoryview, nbytes: int) -> list[memoryview]:
    """So many bytes of the sink, over and over where it is shorter."""
    full, rest = divmod(nbytes, len(sink))
    return [sink] * full + ([sink[:rest]] if rest else [])


def _between(buffers: list[memoryview], begin: int, end: int) -> list[memoryview]:
    """Bytes ``begin`` to ``end`` of what the buffers are together."""
    found = []
    for buffer in buffers:
        if part := buffer[max(begin, 0) : max(end, 0)]:
            found.append(part)
        begin, end = begin - len(buffer), end - len(buffer)
    return found


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
        pieces: of a row that is wanted, (memory, bytes): it goes there, slot after slot, or, with
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

"""Reads rows from flash straight into the caller's memory, many requests at a time.

``plan`` is pure: sorted row numbers to byte ranges, near rows joined. ``RowReader`` carries plans
out on a pool of threads with direct I/O (LLM in a flash, section 4.1: at least 32 KiB a request,
32 threads, no page cache). Where the layout allows it one ``preadv`` scatters a range over slots;
where parts are narrower than a page or not made of whole sectors, the range goes through a small
staging buffer, which on the disks measured is 2.6 times faster than scattering 1.5 KB pieces.

Knows: file, offsets, slots. Does not know: which rows are wanted or why, MLX, models.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from .errors import DamagedError, ReadError
from .rows import PAGE, RowFile

THREADS = 32
REQUEST_BYTES = 1 << 20
GAP_BYTES = 16 << 10  # reading this much for nothing costs less than another request
STAGING_BUFFERS = 8
IOV_MAX = 1024  # the least that Linux and macOS both take


@dataclass(frozen=True)
class Request:
    """One contiguous read: rows ``start`` to ``stop`` of a layer.

    ``first`` and ``last`` delimit, in the sorted list given to ``plan``, the wanted rows in it.
    """

    start: int
    stop: int
    first: int
    last: int


def plan(rows: np.ndarray, *, max_rows: int, gap: int = 0) -> list[Request]:
    """Turn sorted, distinct row numbers into contiguous reads.

    Args:
        rows: int array [n], strictly increasing.
        max_rows: a read spans at most this many rows, gaps included.
        gap: up to this many unwanted rows are read along to save a request.
    """
    if rows.size == 0:
        return []
    if max_rows < 1 or gap < 0:
        raise ValueError(f"max_rows must be at least 1 and gap at least 0, got {max_rows}, {gap}")
    if rows[0] < 0 or (rows.size > 1 and np.diff(rows).min() < 1):
        raise ValueError("rows must be distinct, sorted and not negative")
    requests: list[Request] = []
    breaks = np.flatnonzero(np.diff(rows) > gap + 1) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), rows.size], strict=True):
        while first < last:
            start = int(rows[first])
            cut = first + int(np.searchsorted(rows[first:last], start + max_rows))
            requests.append(Request(start, int(rows[cut - 1]) + 1, first, cut))
            first = cut
    return requests


@dataclass
class ReadStats:
    """What was read since the reader was made. Bytes are bytes asked of the file system.

    ``read_seconds`` is the time during which at least one request was under way.
    """

    requests: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    direct: bool = False

    def __sub__(self, earlier: ReadStats) -> ReadStats:
        diff = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return ReadStats(**{**diff, "direct": self.direct})


def open_direct(path: os.PathLike[str], platform: str = sys.platform) -> tuple[int, bool]:
    """Open for reading past the page cache: (descriptor, whether the file system agreed).

    ``platform`` is a seam for tests: macOS has F_NOCACHE, Linux O_DIRECT.
    """
    if platform == "darwin":
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.fcntl(fd, getattr(fcntl, "F_NOCACHE", 48), 1)
        except OSError:
            return fd, False
        return fd, True
    flag = getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(path, os.O_RDONLY | flag)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return os.open(path, os.O_RDONLY), False
    if not flag or not _direct_read_works(fd):
        os.close(fd)
        return os.open(path, os.O_RDONLY), False
    return fd, True


def _direct_read_works(fd: int) -> bool:
    """Some file systems take the flag and then refuse the reads."""
    with mmap.mmap(-1, PAGE) as page:
        try:
            os.preadv(fd, [page], 0)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
    return True


@dataclass
class PreparedRead:
    """Requests of one set of rows into one set of slots, ready to be issued again and again."""

    rows: np.ndarray
    slots: np.ndarray
    out: Sequence[np.ndarray]
    requests: list[Request]
    iovecs: list[list[memoryview]] | None


class RowReader:
    """Reads rows of a row file into slot memory.

    Args:
        file: the row file.
        threads: reads under way at a time.
        request_bytes: a request is at most this long (or one row, where a row is longer).
        gap_bytes: unwanted bytes read along to join two requests.
        direct: False reads through the page cache.
    """

    def __init__(
        self,
        file: RowFile,
        *,
        threads: int = THREADS,
        request_bytes: int = REQUEST_BYTES,
        gap_bytes: int = GAP_BYTES,
        direct: bool = True,
    ) -> None:
        self.file = file
        self.layout = file.layout
        stride = self.layout.stride
        self.scatters = self.layout.scatters and min(self.layout.extents) >= PAGE
        self.max_rows = max(1, request_bytes // stride)
        if self.scatters:
            self.max_rows = min(self.max_rows, (IOV_MAX - 1) // (len(self.layout.parts) + 1))
        self.gap = gap_bytes // stride
        self.threads = threads
        if direct:
            self._fd, self.direct = open_direct(file.path)
        else:
            self._fd, self.direct = os.open(file.path, os.O_RDONLY), False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mlx_flash-read")
        self._sink = mmap.mmap(-1, -(-stride // PAGE) * PAGE)
        self._staging: queue.LifoQueue[mmap.mmap] = queue.LifoQueue()
        if not self.scatters:
            for _ in range(min(threads, STAGING_BUFFERS)):
                self._staging.put(mmap.mmap(-1, self.max_rows * stride))
        self._lock = threading.Lock()
        self._stats = ReadStats(direct=self.direct)
        self._under_way = 0
        self._since = 0.0

    @property
    def overhead_bytes(self) -> int:
        """Memory that the reader itself holds: staging buffers and the sink for gaps."""
        staging = 0 if self.scatters else min(self.threads, STAGING_BUFFERS) * self.max_rows
        return (staging + 1) * self.layout.stride

    def stats(self) -> ReadStats:
        """A copy of the counters as they stand."""
        with self._lock:
            running = time.perf_counter() - self._since if self._under_way else 0.0
            s = self._stats
            return ReadStats(s.requests, s.bytes_read, s.read_seconds + running, s.direct)

    def prepare(
        self, rows: np.ndarray, slots: np.ndarray, out: Sequence[np.ndarray]
    ) -> PreparedRead:
        """Plan a read of ``rows`` (sorted) so that row ``rows[i]`` lands in slot ``slots[i]``.

        Args:
            out: for each part a uint8 array [capacity, extent of the part]; for direct scattering
                its memory starts on a sector.
        """
        for part, extent, array in zip(self.layout.parts, self.layout.extents, out, strict=True):
            if array.dtype != np.uint8 or array.shape[1:] != (extent,):
                raise ValueError(
                    f"memory for part {part.name} is {array.dtype} {array.shape}, "
                    f"expected uint8 [capacity, {extent}]"
                )
        requests = plan(rows, max_rows=self.max_rows, gap=self.gap)
        iovecs = None
        if self.scatters:
            iovecs = [self._iovec(request, rows, slots, out) for request in requests]
        return PreparedRead(rows, slots, out, requests, iovecs)

    def submit(self, layer: int, read: PreparedRead) -> list[Future[None]]:
        """Start a prepared read on one layer; the rows are there when every future is done."""
        extent = self.file.layers[layer]
        if read.rows.size and int(read.rows[-1]) >= extent.rows:
            raise ValueError(f"row {int(read.rows[-1])} of layer {layer}, it has {extent.rows}")
        return [
            self._pool.submit(self._run, layer, extent.offset, read, i)
            for i in range(len(read.requests))
        ]

    def read(
        self, layer: int, rows: np.ndarray, slots: np.ndarray, out: Sequence[np.ndarray]
    ) -> None:
        """Read rows of a layer and wait for them. Raises ReadError when the disk fails."""
        for future in self.submit(layer, self.prepare(rows, slots, out)):
            future.result()

    def close(self) -> None:
        """Wait for requests under way and let go of the file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _iovec(
        self, request: Request, rows: np.ndarray, slots: np.ndarray, out: Sequence[np.ndarray]
    ) -> list[memoryview]:
        stride, extents = self.layout.stride, self.layout.extents
        sink = memoryview(self._sink)
        tail = stride - sum(extents)
        pieces: list[memoryview] = []
        at = request.start
        for row, slot in zip(
            rows[request.first : request.last].tolist(),
            slots[request.first : request.last].tolist(),
            strict=True,
        ):
            pieces.extend(sink[:stride] for _ in range(row - at))
            pieces.extend(memoryview(array[slot]) for array in out)
            if tail:
                pieces.append(sink[:tail])
            at = row + 1
        return pieces

    def _run(self, layer: int, base: int, read: PreparedRead, index: int) -> None:
        request = read.requests[index]
        offset = base + request.start * self.layout.stride
        nbytes = (request.stop - request.start) * self.layout.stride
        self._enter()
        try:
            if read.iovecs is not None:
                self._preadv(read.iovecs[index], offset, nbytes, layer)
            else:
                self._read_staged(layer, read, request, offset, nbytes)
        finally:
            self._leave(nbytes)

    def _read_staged(
        self, layer: int, read: PreparedRead, request: Request, offset: int, nbytes: int
    ) -> None:
        staging = self._staging.get()
        try:
            self._preadv([memoryview(staging)[:nbytes]], offset, nbytes, layer)
            block = np.frombuffer(staging, np.uint8, nbytes).reshape(-1, self.layout.stride)
            wanted = read.rows[request.first : request.last] - request.start
            slots = read.slots[request.first : request.last]
            source, target = _as_slice(wanted), _as_slice(slots)
            for part, array in zip(self.layout.parts, read.out, strict=True):
                array[target, : part.nbytes] = block[
                    source, part.offset : part.offset + part.nbytes
                ]
        finally:
            self._staging.put(staging)

    def _preadv(self, buffers: list[memoryview], offset: int, nbytes: int, layer: int) -> None:
        """Read until ``nbytes`` are there; a short read is continued where it stopped."""
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(self._fd, _after(buffers, done), offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise ReadError(
                    error.errno,
                    f"reading {self.file.path}, layer {layer}, row {self._row(layer, offset)}, "
                    f"offset {offset + done}, {nbytes - done} bytes: {error.strerror}",
                ) from error
            if got == 0:
                raise DamagedError(
                    f"{self.file.path} ended at byte {offset + done} inside layer {layer}, row "
                    f"{self._row(layer, offset + done)}; it was cut while in use"
                )
            done += got

    def _row(self, layer: int, offset: int) -> int:
        return (offset - self.file.layers[layer].offset) // self.layout.stride

    def _enter(self) -> None:
        with self._lock:
            if self._under_way == 0:
                self._since = time.perf_counter()
            self._under_way += 1

    def _leave(self, nbytes: int) -> None:
        with self._lock:
            self._under_way -= 1
            self._stats.requests += 1
            self._stats.bytes_read += nbytes
            if self._under_way == 0:
                self._stats.read_seconds += time.perf_counter() - self._since


def _as_slice(index: np.ndarray) -> slice | np.ndarray:
    """A run of consecutive numbers as a slice, which copies without an index array."""
    first = int(index[0])
    if int(index[-1]) - first == index.size - 1 and bool((np.diff(index) == 1).all()):
        return slice(first, first + index.size)
    return index


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """The buffers without their first ``done`` bytes."""
    if done == 0:
        return buffers
    rest = list(buffers)
    while done >= len(rest[0]):
        done -= len(rest.pop(0))
    rest[0] = rest[0][done:]
    return rest

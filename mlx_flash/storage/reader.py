"""Reads rows from flash straight into the caller's memory, many requests at a time.

``RowReader`` carries out what ``read_plan`` makes of row numbers, with direct I/O (LLM in a flash,
section 4.1: at least 32 KiB a request, 32 threads, no page cache). A few rows at a time are
scattered over their slots by one request, where the layout allows it; where Linux has asynchronous
reads, one thread hands all of these to the kernel, elsewhere a pool of threads reads them. A long
run of rows goes through one of a few staging buffers on huge pages and is copied from there: on the
Linux disk measured, 1 MiB into pages that lie together came at 2.2 to 2.5 GB/s, into ordinary pages
or scattered in 4 KiB pieces at 0.9.

Knows: file, offsets, slots. Does not know: which rows are wanted or why, MLX, models.
"""

from __future__ import annotations

import math
import mmap
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Self

import numpy as np

from mlx_flash.errors import DamagedError, ReadError

from . import huge_pages, linux_aio, scatter_list
from .direct_io import open_direct
from .read_requests import Request, as_slice, cut, gap_bytes, plan, plan_scattered
from .row_file import RowFile
from .row_layout import PAGE, RowLayout
from .scatter_list import PreparedRead, iovec, prepare, where

THREADS = 32
REQUEST_BYTES = 2 << 20
GAP_BYTES = gap_bytes()  # reading this much for nothing costs no more than another request
STAGING_BUFFERS = 8
BEHIND = 2  # requests under way that nobody waits for yet


@dataclass
class ReadStats:
    """What was read since the reader was made. Bytes are bytes asked of the file system.

    ``read_seconds`` is the time during which at least one request was under way, as seen by the
    threads that read: until one of them knows that it is over, which is not when somebody asks.
    """

    requests: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    direct: bool = False

    def __sub__(self, earlier: Self) -> Self:
        diff = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return type(self)(**{**diff, "direct": self.direct})


class RowReader:
    """Reads rows of a row file into slot memory.

    Args:
        file: the row file.
        threads: reads under way at a time; of long runs at most ``STAGING_BUFFERS``, of
            asynchronous ones ``aio.DEPTH`` of what was submitted at once.
        request_bytes: a request is at most this long (or one row, where a row is longer and cannot
            be scattered).
        gap_bytes: unwanted bytes read along to join two requests; None for ``GAP_BYTES``,
            and none between scattered rows that are read asynchronously.
        direct: False reads through the page cache.
        engine: how scattered requests are read, "aio" or "threads"; None for aio where the system
            allows it and the file is read past the page cache.

    Raises ReadError when the file cannot be opened, ValueError when the engine is not to be had.
    """

    def __init__(
        self,
        file: RowFile,
        *,
        threads: int = THREADS,
        request_bytes: int = REQUEST_BYTES,
        gap_bytes: int | None = None,
        direct: bool = True,
        engine: str | None = None,
    ) -> None:
        self.file = file
        self.request_bytes = request_bytes
        self.gap_bytes = GAP_BYTES if gap_bytes is None else gap_bytes
        self._joins = gap_bytes is not None
        self.threads = threads
        layouts = file.layouts
        # Every offset, length and address that is read with is a multiple of this.
        extents = [n for layout in layouts if layout.scatters for n in layout.extents]
        self._grain = math.gcd(PAGE, *(layout.stride for layout in layouts), *extents)
        self._sink = memoryview(mmap.mmap(-1, self._sink_bytes))
        self._staging: queue.LifoQueue[np.ndarray] = queue.LifoQueue()
        for buffer in huge_pages.buffers(self.bulk_threads, self._staging_bytes):
            self._staging.put(buffer)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mlx_flash-read")
        # No more threads than buffers: threads that wait for one only cost time.
        self._bulk = ThreadPoolExecutor(self.bulk_threads, thread_name_prefix="mlx_flash-bulk-read")
        self._lock, self._under_way = threading.Condition(), 0
        self._needed = 0  # of the requests under way, those that somebody waits for
        self._behind = ThreadPoolExecutor(BEHIND, thread_name_prefix="mlx_flash-read-behind")
        self._fd = self._buffered_fd = -1
        self._open, self.direct = True, False
        try:
            self._fd = self._buffered_fd = os.open(file.path, os.O_RDONLY)
            if direct:
                self._fd, self.direct = open_direct(file.path, grain=self._grain)
            self.engine = self._choose(engine)
        except OSError as error:
            self.close()
            raise ReadError(error.errno, f"opening {file.path}: {error.strerror}") from error
        except ValueError:
            self.close()
            raise
        self._stats = ReadStats(direct=self.direct)
        self._since = 0.0

    def _choose(self, engine: str | None) -> str:
        if engine not in (None, "aio", "threads"):
            raise ValueError(f'engine must be "aio", "threads" or None, got {engine!r}')
        if engine == "threads":
            return engine
        missing = linux_aio.why_not() if self.direct else "it is not read past the page cache"
        if missing and engine:
            raise ValueError(f"no asynchronous reads of {self.file.path}: {missing}")
        return "threads" if missing else "aio"

    @property
    def overhead_bytes(self) -> int:
        """Memory that the reader itself holds: staging buffers and the sink for gaps."""
        return self._sink_bytes + self.bulk_threads * self._staging_bytes + huge_pages.HUGE_PAGE

    @property
    def _sink_bytes(self) -> int:
        """Of what is read for nothing: a row that is left out, or a request's worth of it."""
        sizes = [
            min(layout.stride, self.request_bytes) if self._in_pieces(layout) else layout.stride
            for layout in self.file.layouts
        ]
        return _pages(max(sizes))

    @property
    def _staging_bytes(self) -> int:
        """Of one staging buffer; rows longer than a request that scatter are never staged."""
        staged = [
            self.max_rows(layout) * layout.stride
            for layout in self.file.layouts
            if not self._in_pieces(layout)
        ]
        return _pages(max(staged, default=1))

    def max_rows(self, layout: RowLayout) -> int:
        """A request spans at most so many rows."""
        return max(1, self.request_bytes // layout.stride)

    def _in_pieces(self, layout: RowLayout) -> bool:
        """Whether a row takes several requests, each straight into its slot."""
        return layout.scatters and layout.stride > self.request_bytes

    @property
    def bulk_threads(self) -> int:
        """Reads of long runs under way at a time, each with a staging buffer."""
        return min(self.threads, STAGING_BUFFERS)

    def stats(self) -> ReadStats:
        """A copy of the counters as they stand."""
        with self._lock:
            running = time.perf_counter() - self._since if self._under_way else 0.0
            s = self._stats
            return ReadStats(s.requests, s.bytes_read, s.read_seconds + running, s.direct)

    def prepare(
        self,
        rows: np.ndarray,
        slots: np.ndarray,
        out: Sequence[np.ndarray | None],
        layer: int = 0,
    ) -> PreparedRead:
        """Plan a read of ``rows`` so that row ``rows[i]`` lands in slot ``slots[i]``.

        Args:
            rows, slots, out: see ``prepared.prepare``.
            layer: any layer with the layout of those that it will be used for.
        """
        layout = self.file.layers[layer].layout
        grain = self._grain if self.direct else 1
        read = prepare(layout, rows, slots, out, grain)
        if self._in_pieces(layout):
            for request in plan(rows, max_rows=1):
                pieces = cut(request, read.first, read.last, self.request_bytes, self._grain)
                read.scattered.extend(pieces)
            return read
        gap = self.gap_bytes // layout.stride
        most = self.max_rows(layout)
        if layout.scatters:
            # A row that goes nowhere is a piece of its own: to the kernel as dear as a request.
            few_gap = gap if self._joins or self.engine == "threads" else 0
            found = plan_scattered(rows, max_rows=most, gap=gap, few_gap=few_gap)
            read.scattered, read.staged = found
        else:
            read.staged = plan(rows, max_rows=most, gap=gap)
        return read

    def submit(self, layer: int, read: PreparedRead, behind: bool = False) -> list[Future[None]]:
        """Start a prepared read on one layer; the rows are there when every future is done.

        Args:
            behind: begin requests only while none is under way that was not asked for like this:
                a read that may turn out to be of no use does not hold up those that are needed.
        """
        extent = self.file.layers[layer]
        if read.layout != extent.layout:
            raise ValueError(f"the read was prepared for rows of another layout than layer {layer}")
        if read.rows.size and int(read.rows[-1]) >= extent.rows:
            raise ValueError(f"row {int(read.rows[-1])} of layer {layer}, it has {extent.rows}")
        if behind:
            return self._submit_behind(layer, extent.offset, read)
        # Handing a request to a thread costs as much as half a read of 16 KiB: each thread is asked
        # once, begins with a request of its own and goes on with what is left of the rest.
        at_once = self._at_once(read)
        each = [] if at_once else read.scattered
        first, rest = each[: self.threads], iter(each[self.threads :])
        futures: list[Future[None]] = []
        try:
            if at_once:
                futures.append(self._pool.submit(self._run_at_once, layer, extent.offset, read))
            for request in read.staged:
                futures.append(
                    self._bulk.submit(self._run, layer, extent.offset, read, [request], True)
                )
            for request in first:
                requests = chain([request], rest)
                futures.append(
                    self._pool.submit(self._run, layer, extent.offset, read, requests, False)
                )
        except BaseException:
            self.drop(futures)
            self._check_open()
            raise
        return futures

    def _submit_behind(self, layer: int, base: int, read: PreparedRead) -> list[Future[None]]:
        futures: list[Future[None]] = []
        try:
            for staged, requests in ((True, read.staged), (False, read.scattered)):
                for request in requests:
                    args = layer, base, read, [request], staged
                    futures.append(self._behind.submit(self._run_behind, *args))
        except BaseException:
            self.drop(futures)
            self._check_open()
            raise
        return futures

    def wait(self, futures: Sequence[Future[None]]) -> None:
        """Wait for requests of ``submit``; raises what went wrong.

        However it ends, none of them writes into memory any more.
        """
        try:
            wait(futures, return_when=FIRST_EXCEPTION)  # wakes this thread once
            for future in futures:
                future.result()
        except BaseException:
            self.drop(futures)
            raise

    def drop(self, futures: Sequence[Future[None]]) -> None:
        """Cancel requests that have not begun and wait for the rest, whatever becomes of them."""
        wait([future for future in futures if not future.cancel()])

    def read(
        self, layer: int, rows: np.ndarray, slots: np.ndarray, out: Sequence[np.ndarray | None]
    ) -> None:
        """Read rows of a layer and wait for them.

        Raises ReadError when the disk fails, DamagedError when the file was cut.
        """
        read = self.prepare(rows, slots, out, layer)
        here = self._at_once(read)
        futures = self.submit(layer, replace(read, scattered=[]) if here else read)
        if here:  # waking another thread for it, and being woken, costs as much as many requests
            try:
                self._run_at_once(layer, self.file.layers[layer].offset, read)
            except BaseException:
                self.drop(futures)
                raise
        self.wait(futures)

    def _at_once(self, read: PreparedRead) -> bool:
        """Whether the scattered requests are read asynchronously: they are many and small."""
        return self.engine == "aio" and bool(read.scattered) and not self._in_pieces(read.layout)

    def close(self) -> None:
        """Wait for requests under way, fail those that have not begun, let go of the file."""
        # Not by cancel_futures: whoever waits for futures dropped that way waits for ever.
        self._open = False
        with self._lock:
            self._lock.notify_all()
        for pool in (self._pool, self._bulk, self._behind):
            pool.shutdown(wait=True)
        with self._lock:  # whoever reads in a thread of its own
            self._lock.wait_for(lambda: not self._under_way)
        for fd in {self._fd, self._buffered_fd} - {-1}:
            os.close(fd)
        self._fd = self._buffered_fd = -1

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"the reader of {self.file.path} is closed") from None

    def _run_behind(self, *args: Any) -> None:
        with self._lock:
            self._lock.wait_for(lambda: not self._needed or not self._open)
        self._run(*args, needed=False)

    def _run(
        self,
        layer: int,
        base: int,
        read: PreparedRead,
        requests: Iterable[Request],
        staged: bool,
        needed: bool = True,
    ) -> None:
        """Carry requests out, one after the other; several threads may share what gives them."""
        count, total = 0, 0
        self._enter(needed)
        try:
            for request in requests:
                self._check_open()
                offset, nbytes = where(base, read, request)
                count, total = count + 1, total + nbytes
                if staged:
                    self._read_staged(layer, read, request, offset, nbytes)
                else:
                    self._preadv(iovec(read, request, self._sink), offset, nbytes, layer)
        except BaseException:
            deque(requests, maxlen=0)  # nobody goes on with the rest
            raise
        finally:
            self._leave(count, total, needed)

    def _run_at_once(self, layer: int, base: int, read: PreparedRead) -> None:
        """Carry all scattered requests out together; what did not come whole is read on here."""
        stride = read.layout.stride
        requests = scatter_list.as_array(read.scattered)
        offsets = base + requests["start"] * stride + read.first
        nbytes = (requests["stop"] - requests["start"] - 1) * stride + read.last - read.first
        memory, firsts = scatter_list.vectors(
            requests, read.rows, read.slots, read.pieces, stride, self._sink
        )
        begun = np.zeros(offsets.size, bool)
        self._enter(True)
        try:
            got = linux_aio.read(self._fd, offsets, memory, firsts, stop=lambda: not self._open)
            begun = got != linux_aio.NOT_BEGUN
            if not begun.any() and self._open:  # the system has no room for it any more
                self.engine = "threads"
            for i in np.flatnonzero(got != nbytes).tolist():
                if not begun[i]:
                    self._check_open()
                begun[i] = True
                buffers = iovec(read, read.scattered[i], self._sink)
                done = max(0, int(got[i]))
                self._preadv(buffers, int(offsets[i]), int(nbytes[i]), layer, done)
        finally:
            self._leave(int(begun.sum()), int(nbytes[begun].sum()), True)

    def _read_staged(
        self, layer: int, read: PreparedRead, request: Request, offset: int, nbytes: int
    ) -> None:
        staging = self._staging.get()
        try:
            begin = memoryview(staging)[read.first : read.first + nbytes]
            self._preadv([begin], offset, nbytes, layer)
            count, layout = request.stop - request.start, read.layout
            block = staging[: count * layout.stride].reshape(count, layout.stride)
            wanted = read.rows[request.first : request.last] - request.start
            slots = read.slots[request.first : request.last]
            source, target = as_slice(wanted), as_slice(slots)
            for part, extent, array in zip(layout.parts, layout.extents, read.out, strict=True):
                if array is not None:
                    array[target] = block[source, part.offset : part.offset + extent]
        finally:
            self._staging.put(staging)

    def _preadv(
        self, buffers: list[memoryview], offset: int, nbytes: int, layer: int, done: int = 0
    ) -> None:
        """Read until ``nbytes`` are there; a short read is continued where it stopped."""
        while done < nbytes:
            at = offset + done
            # Direct I/O cannot begin inside a sector.
            fd = self._buffered_fd if done % self._grain else self._fd
            try:
                got = os.preadv(fd, _after(buffers, done), at)
            except InterruptedError:
                continue
            except OSError as error:
                raise ReadError(
                    error.errno,
                    f"reading {self.file.path}, layer {layer}, row {self._row(layer, at)}, "
                    f"offset {at}, {nbytes - done} bytes: {error.strerror}",
                ) from error
            if got == 0:
                raise DamagedError(
                    f"{self.file.path} ended at byte {at} inside layer {layer}, row "
                    f"{self._row(layer, at)}; it was cut while in use"
                )
            done += got

    def _row(self, layer: int, offset: int) -> int:
        extent = self.file.layers[layer]
        return (offset - extent.offset) // extent.layout.stride

    def _enter(self, needed: bool) -> None:
        with self._lock:
            if self._under_way == 0:
                self._since = time.perf_counter()
            self._under_way += 1
            self._needed += needed

    def _leave(self, requests: int, nbytes: int, needed: bool) -> None:
        with self._lock:
            self._under_way -= 1
            self._needed -= needed
            self._stats.requests += requests
            self._stats.bytes_read += nbytes
            if self._under_way == 0:
                self._stats.read_seconds += time.perf_counter() - self._since
            if not self._needed:
                self._lock.notify_all()


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """The buffers without their first ``done`` bytes."""
    if done == 0:
        return buffers
    rest = list(buffers)
    while done >= len(rest[0]):
        done -= len(rest.pop(0))
    rest[0] = rest[0][done:]
    return rest

"""Reads rows from flash straight into the caller's memory, many requests at a time.

``RowReader`` carries out what ``read_requests`` makes of row numbers, with direct I/O (LLM in a
flash, section 4.1: at least 32 KiB a request, 32 threads, no page cache). A few rows at a time are
scattered over their slots by one request, where the layout allows it: by the engine that suits the
system. A long run of rows is staged: read in one piece and copied from there.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any, Self

import numpy as np

from mlx_flash.common.sizes import round_up
from mlx_flash.errors import ClosedError, ReadError

from . import huge_pages
from .direct_io import OpenedFile
from .engines import NOT_BEGUN, Begun, Job, ReadEngine, ThreadEngine, open_engine
from .read_requests import Request, cut, gap_bytes, plan, plan_scattered
from .row_file import RowFile
from .row_layout import PAGE, RowLayout
from .scatter_list import PreparedRead, prepare
from .staging import StagingEngine

THREADS = 32
REQUEST_BYTES = 2 << 20
GAP_BYTES = gap_bytes()  # reading this many unwanted bytes costs no more than a request
STAGING_BUFFERS = 8
BEHIND = 2  # requests of reads ahead that are under way at a time


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

    Raises ReadError when the file cannot be opened, ValueError when the engine cannot read it.
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
        self._open = True
        self._process = os.getpid()
        layouts = file.layouts
        # Every offset, length and address that is read with is a multiple of this.
        extents = [n for layout in layouts if layout.scatters for n in layout.extents]
        self.grain = math.gcd(PAGE, *(layout.stride for layout in layouts), *extents)
        try:
            self._opened = OpenedFile(file.path, self.grain, direct)
        except OSError as error:
            raise ReadError(error.errno, f"opening {file.path}: {error.strerror}") from error
        try:
            self._engine = open_engine(self._opened, engine)
        except BaseException:
            self._opened.close()
            raise
        self.direct = self._opened.direct
        self._plain = ThreadEngine(self._opened)
        self._staging = StagingEngine(self._opened, self.bulk_threads, self._staging_bytes)
        self._sink = memoryview(mmap.mmap(-1, self._sink_bytes))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mlx_flash-read")
        # No more threads than buffers: threads that wait for one only cost time.
        self._bulk = ThreadPoolExecutor(self.bulk_threads, thread_name_prefix="mlx_flash-bulk-read")
        self._behind = ThreadPoolExecutor(BEHIND, thread_name_prefix="mlx_flash-read-behind")
        self._lock, self._under_way = threading.Condition(), 0
        self._needed = 0  # of the requests under way, those that somebody waits for
        self._stats = ReadStats(direct=self.direct)
        self._since = 0.0

    @property
    def engine(self) -> str:
        """Name of the engine that carries scattered requests out."""
        return self._engine.name

    @property
    def overhead_bytes(self) -> int:
        """Memory that the reader itself holds: staging buffers and the sink for gaps."""
        return self._sink_bytes + self.bulk_threads * self._staging_bytes + huge_pages.HUGE_PAGE

    @property
    def _sink_bytes(self) -> int:
        """Bytes of the memory for unwanted rows: a row, or as much of it as a request reads."""
        sizes = [
            min(layout.stride, self.request_bytes) if self._in_pieces(layout) else layout.stride
            for layout in self.file.layouts
        ]
        return round_up(max(sizes), PAGE)

    @property
    def _staging_bytes(self) -> int:
        """Of one staging buffer; rows longer than a request that scatter are never staged."""
        staged = [
            self.max_rows(layout) * layout.stride
            for layout in self.file.layouts
            if not self._in_pieces(layout)
        ]
        return round_up(max(staged, default=1), PAGE)

    def max_rows(self, layout: RowLayout) -> int:
        """The most rows that one request spans."""
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
        engine = self._engine_for(layout)
        read = prepare(layout, rows, slots, out, engine.capabilities.alignment)
        if self._in_pieces(layout):
            for request in plan(rows, max_rows=1):
                pieces = cut(request, read.first, read.last, self.request_bytes, self.grain)
                read.scattered.extend(pieces)
            return read
        gap = self.gap_bytes // layout.stride
        most = self.max_rows(layout)
        if layout.scatters:
            few_gap = gap if self._joins or engine.capabilities.joins_gaps else 0
            found = plan_scattered(rows, max_rows=most, gap=gap, few_gap=few_gap)
            read.scattered, read.staged = found
        else:
            read.staged = plan(rows, max_rows=most, gap=gap)
        return read

    def _engine_for(self, layout: RowLayout) -> ReadEngine:
        """What carries out scattered requests; threads, where rows are long and cut in pieces."""
        return self._plain if self._in_pieces(layout) else self._engine

    def submit(self, layer: int, read: PreparedRead, behind: bool = False) -> list[Future[None]]:
        """Start a prepared read on one layer; the rows are there when every future is done.

        Args:
            behind: begin requests only while none is under way that was not asked for like this:
                a read that may turn out to be of no use does not hold up those that are needed.
        """
        if os.getpid() != self._process:
            self.check_usable()
        extent = self.file.layers[layer]
        if read.layout != extent.layout:
            raise ValueError(f"the read was prepared for rows of another layout than layer {layer}")
        if read.rows.size and int(read.rows[-1]) >= extent.rows:
            raise ValueError(f"row {int(read.rows[-1])} of layer {layer}, it has {extent.rows}")
        job = Job(read, extent.offset, self._sink, partial(self._place, layer))
        futures: list[Future[None]] = []
        try:
            if behind:
                self._begin_behind(job, futures)
            else:
                self._begin(job, futures)
        except BaseException:
            self.drop(futures)
            self._check_open()
            raise
        return futures

    def _begin(self, job: Job, futures: list[Future[None]]) -> None:
        # Handing a request to a thread costs as much as half a read of 16 KiB: each thread is asked
        # once, begins with a request of its own and goes on with what is left of the rest.
        engine, scattered = self._engine_for(job.read.layout), job.read.scattered
        if scattered and engine.capabilities.max_in_flight > 1:
            futures.append(self._pool.submit(self._carry_out, engine, job, scattered))
            scattered = []
        for request in job.read.staged:
            futures.append(self._bulk.submit(self._carry_out, self._staging, job, [request]))
        first, rest = scattered[: self.threads], iter(scattered[self.threads :])
        for request in first:
            requests = chain([request], rest)
            futures.append(self._pool.submit(self._carry_out, engine, job, requests))

    def _begin_behind(self, job: Job, futures: list[Future[None]]) -> None:
        staged, scattered = (self._staging, job.read.staged), (self._plain, job.read.scattered)
        for engine, requests in (staged, scattered):
            for request in requests:
                futures.append(self._behind.submit(self._run_behind, engine, job, [request]))

    def wait(self, futures: Sequence[Future[None]]) -> None:
        """Wait for requests of ``submit``; raises what went wrong.

        On return or exception none of them writes into memory any more.
        """
        try:
            wait(futures, return_when=FIRST_EXCEPTION)  # wakes this thread once
            for future in futures:
                future.result()
        except BaseException:
            self.drop(futures)
            raise

    def drop(self, futures: Sequence[Future[None]]) -> None:
        """Cancel requests that have not begun, wait for the rest; their errors are not raised."""
        wait([future for future in futures if not future.cancel()])

    def read(
        self, layer: int, rows: np.ndarray, slots: np.ndarray, out: Sequence[np.ndarray | None]
    ) -> None:
        """Read rows of a layer and wait for them.

        Raises ReadError when the disk fails, DamagedError when the file was cut.
        """
        read = self.prepare(rows, slots, out, layer)
        engine = self._engine_for(read.layout)
        # Waking another thread for it, and being woken, costs as much as many requests.
        here = bool(read.scattered) and engine.capabilities.max_in_flight > 1
        futures = self.submit(layer, replace(read, scattered=[]) if here else read)
        if here:
            offset = self.file.layers[layer].offset
            job = Job(read, offset, self._sink, partial(self._place, layer))
            try:
                self._carry_out(engine, job, read.scattered)
            except BaseException:
                self.drop(futures)
                raise
        self.wait(futures)

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
        self._opened.close()

    def check_usable(self) -> None:
        """Raise unless rows can be read as they were when the file was opened.

        Raises:
            ClosedError: the reader is closed, or its threads are those of another process.
            DamagedError: the file was written to since; one that took its name does no harm.
        """
        self._check_open()
        if os.getpid() != self._process:
            raise ClosedError(
                f"{self.file.path} was opened by process {self._process} and this one, "
                f"{os.getpid()}, was forked since, without its threads; load the model in the "
                "process that uses it (multiprocessing: start method spawn)"
            )
        self._opened.check_unchanged(self._place_in_file)

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError(
                f"the reader of {self.file.path} is closed; load the model again"
            ) from None

    def _run_behind(self, *args: Any) -> None:
        with self._lock:
            self._lock.wait_for(lambda: not self._needed or not self._open)
        self._carry_out(*args, needed=False)

    def _carry_out(
        self, engine: ReadEngine, job: Job, requests: Iterable[Request], needed: bool = True
    ) -> None:
        """Have requests carried out; several threads may share what gives them."""
        begun = Begun()
        self._enter(needed)
        try:
            self._check_open()
            short = engine.read(job, requests, begun, self._is_closed)
            if short and not begun.requests and self._open:  # it cannot read here any more
                self._engine = self._plain
            for request, got in short:
                offset, nbytes = job.extent(request)
                if got == NOT_BEGUN:
                    self._check_open()
                    begun.requests, begun.nbytes = begun.requests + 1, begun.nbytes + nbytes
                self._opened.read(job.buffers(request), offset, nbytes, job.place, max(0, got))
        except BaseException:
            deque(requests, maxlen=0)  # nobody goes on with the rest
            raise
        finally:
            self._leave(begun, needed)

    def _is_closed(self) -> bool:
        return not self._open

    def _place(self, layer: int, offset: int) -> str:
        extent = self.file.layers[layer]
        return f"layer {layer}, row {(offset - extent.offset) // extent.layout.stride}"

    def _place_in_file(self, offset: int) -> str:
        begun = [i for i, layer in enumerate(self.file.layers) if layer.offset <= offset]
        return self._place(begun[-1], offset) if begun else "the header"

    def _enter(self, needed: bool) -> None:
        with self._lock:
            if self._under_way == 0:
                self._since = time.perf_counter()
            self._under_way += 1
            self._needed += needed

    def _leave(self, begun: Begun, needed: bool) -> None:
        with self._lock:
            self._under_way -= 1
            self._needed -= needed
            self._stats.requests += begun.requests
            self._stats.bytes_read += begun.nbytes
            if self._under_way == 0:
                self._stats.read_seconds += time.perf_counter() - self._since
            if not self._needed:
                self._lock.notify_all()

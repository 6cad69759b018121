"""Ways to carry out requests: by threads, by Linux' asynchronous reads.

A way is a class with the methods of ``ReadEngine`` and an entry in ``ENGINES``; the reader plans by
its ``capabilities`` and knows no more of it. A third one, such as io_uring or a Mac's
MTLIOCommandQueue, needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from . import linux_aio
from .direct_io import OpenedFile
from .read_requests import Request
from .scatter_list import PreparedRead, as_array, iovec, vectors, where

NOT_BEGUN = linux_aio.NOT_BEGUN


class EngineUnavailable(Exception):
    """Why an engine cannot read a file here."""


@dataclass(frozen=True)
class Capabilities:
    """What the reader has to know of an engine to plan for it.

    Args:
        max_in_flight: requests that one call of ``read`` has under way at a time. Where it is one,
            many threads call at once and share the requests; else one thread calls with all.
        joins_gaps: whether one request over a gap of unwanted rows costs less than two requests.
            It does not where each piece of memory costs as much as a request.
        alignment: memory, offsets and lengths must be multiples of this many bytes.
    """

    max_in_flight: int = 1
    joins_gaps: bool = True
    alignment: int = 1


@dataclass
class Begun:
    """Requests that were begun, and their bytes, whatever became of them."""

    requests: int = 0
    nbytes: int = 0


# A request that did not come whole, and the bytes of it that came: minus the number of an error
# where none did, ``NOT_BEGUN`` where it was left out. The reader reads it on.
Short = tuple[Request, int]


class Job:
    """A prepared read on one layer: where its requests lie in the file, and where bytes go.

    Args:
        read: from ``scatter_list.prepare``, requests planned.
        base: offset of the layer's first row in the file.
        sink: memory that takes what is not wanted.
        place: names the layer and row at an offset, for errors.
    """

    def __init__(
        self, read: PreparedRead, base: int, sink: memoryview, place: Callable[[int], str]
    ) -> None:
        self.read, self.base, self.sink, self.place = read, base, sink, place

    def extent(self, request: Request) -> tuple[int, int]:
        """Offset in the file and number of bytes of a request."""
        return where(self.base, self.read, request)

    def buffers(self, request: Request) -> list[memoryview]:
        """Memory that a request fills, in the order of the file."""
        return iovec(self.read, request, self.sink)

    def arrays(
        self, requests: Sequence[Request]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All of it at once, of requests for whole rows.

        Returns (offsets int64 [n], bytes int64 [n], memory as IOVEC array, index int64 [n] where
        that of each request begins).
        """
        read = self.read
        stride = read.layout.stride
        found = as_array(requests)
        offsets = self.base + found["start"] * stride + read.first
        nbytes = (found["stop"] - found["start"] - 1) * stride + read.last - read.first
        memory, firsts = vectors(found, read.rows, read.slots, read.pieces, stride, self.sink)
        return offsets, nbytes, memory, firsts


class ReadEngine(Protocol):
    """Carries out requests for rows that are scattered over their slots.

    An engine is made with the opened file and raises ``EngineUnavailable`` where it cannot read it.
    """

    name: str
    capabilities: Capabilities

    def __init__(self, file: OpenedFile) -> None: ...

    def read(
        self, job: Job, requests: Iterable[Request], begun: Begun, stop: Callable[[], bool]
    ) -> Sequence[Short]:
        """Carry out requests and wait for them; returns those that did not come whole.

        May be called from several threads. On return or exception none of them is in flight.

        Args:
            requests: of ``job``. With one in flight, each is taken when the one before is done:
                several threads take from the same ones. With more, they are a list, of whole rows.
            begun: adds up what was begun.
            stop: True leaves those that were not begun.
        """
        ...


class ThreadEngine:
    """A request after the other, by ``preadv``; the reader has it run in many threads."""

    name = "threads"

    def __init__(self, file: OpenedFile) -> None:
        self._file = file
        self.capabilities = Capabilities(alignment=file.grain if file.direct else 1)

    def read(
        self, job: Job, requests: Iterable[Request], begun: Begun, stop: Callable[[], bool]
    ) -> Sequence[Short]:
        """See ``ReadEngine.read``."""
        read, base, sink = job.read, job.base, job.sink
        for request in requests:
            if stop():
                return [(request, NOT_BEGUN)]
            offset, nbytes = where(base, read, request)
            begun.requests += 1
            begun.nbytes += nbytes
            self._file.read(iovec(read, request, sink), offset, nbytes, job.place)
        return ()


class LinuxAioEngine:
    """All requests of a read given to the kernel by one thread; see ``linux_aio``."""

    name = "aio"

    def __init__(self, file: OpenedFile) -> None:
        if not file.direct:
            raise EngineUnavailable("it is not read past the page cache")
        if missing := linux_aio.why_not():
            raise EngineUnavailable(missing)
        self._file = file
        self.capabilities = Capabilities(linux_aio.DEPTH, joins_gaps=False, alignment=file.grain)

    def read(
        self, job: Job, requests: Iterable[Request], begun: Begun, stop: Callable[[], bool]
    ) -> Sequence[Short]:
        """See ``ReadEngine.read``."""
        wanted = list(requests)
        offsets, nbytes, memory, firsts = job.arrays(wanted)
        got = linux_aio.read(self._file.fd, offsets, memory, firsts, stop)
        done = got != NOT_BEGUN
        begun.requests += int(done.sum())
        begun.nbytes += int(nbytes[done].sum())
        return [(wanted[i], int(got[i])) for i in np.flatnonzero(got != nbytes).tolist()]


ENGINES: dict[str, type[ReadEngine]] = {"aio": LinuxAioEngine, "threads": ThreadEngine}


def open_engine(file: OpenedFile, name: str | None = None) -> ReadEngine:
    """The engine of that name, or the first of ``ENGINES`` that can read a file.

    Raises ValueError where there is no such engine or it cannot read the file.
    """
    if name is not None and name not in ENGINES:
        known = ", ".join(f'"{known}"' for known in ENGINES)
        raise ValueError(f"engine must be one of {known} or None, got {name!r}")
    reasons = []
    for kind in [name] if name else ENGINES:
        try:
            engine = ENGINES[kind](file)
        except EngineUnavailable as why:
            reasons.append(f"{kind}: {why}")
            continue
        if file.grain % engine.capabilities.alignment == 0:
            return engine
        reasons.append(
            f"{kind}: rows begin on multiples of {file.grain} bytes, not of "
            f"{engine.capabilities.alignment}"
        )
    raise ValueError(f"no engine for reads of {file.path}: " + "; ".join(reasons))

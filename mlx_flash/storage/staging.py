"""Long runs of rows: read into a buffer in one piece, copied from there to their slots.

On the Linux disk measured, 1 MiB came at 2.2 to 2.5 GB/s into memory on huge pages and at 0.9 into
ordinary pages or scattered in 4 KiB pieces.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from . import huge_pages
from .direct_io import OpenedFile
from .engines import NOT_BEGUN, Begun, Capabilities, Job, Short
from .read_requests import Request, as_slice


class StagingEngine:
    """Reads requests through buffers of its own; a thread for each.

    Args:
        file: to read from.
        count: buffers; as many threads may read at a time, others wait for one.
        nbytes: of a buffer; no request is longer.
    """

    name = "staging"

    def __init__(self, file: OpenedFile, count: int, nbytes: int) -> None:
        self._file = file
        self.capabilities = Capabilities()
        self._buffers: queue.LifoQueue[np.ndarray] = queue.LifoQueue()
        for buffer in huge_pages.buffers(count, nbytes):
            self._buffers.put(buffer)

    def read(
        self, job: Job, requests: Iterable[Request], begun: Begun, stop: Callable[[], bool]
    ) -> Sequence[Short]:
        """See ``ReadEngine.read``."""
        for request in requests:
            if stop():
                return [(request, NOT_BEGUN)]
            buffer = self._buffers.get()
            try:
                self._read(job, request, buffer, begun)
            finally:
                self._buffers.put(buffer)
        return ()

    def _read(self, job: Job, request: Request, buffer: np.ndarray, begun: Begun) -> None:
        read, layout = job.read, job.read.layout
        offset, nbytes = job.extent(request)
        begun.requests += 1
        begun.nbytes += nbytes
        whole = memoryview(buffer)[read.first : read.first + nbytes]
        self._file.read([whole], offset, nbytes, job.place)
        count = request.stop - request.start
        block = buffer[: count * layout.stride].reshape(count, layout.stride)
        source = as_slice(read.rows[request.first : request.last] - request.start)
        target = as_slice(read.slots[request.first : request.last])
        for part, extent, array in zip(layout.parts, layout.extents, read.out, strict=True):
            if array is not None:
                array[target] = block[source, part.offset : part.offset + extent]

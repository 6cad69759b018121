"""The Linux kernel's asynchronous reads: many requests at a time from one thread.

Threads around ``os.preadv`` hand Python's lock to one another between any two reads, which took 43
to 61 us of processor a request. Here a batch of requests is built as arrays, given to the kernel in
one call and waited for in another, both without Python's lock (io_submit(2), io_getevents(2)).

A request may fail or end short like any read; what is not whole is for the caller to go on with.

Knows: descriptors, offsets, addresses, system calls by number. Does not know: rows, files, whose
memory it is. Reads past the page cache are meant: others make ``io_submit`` wait for the disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

import numpy as np

from mlx_flash.common.platform import current_platform

DEPTH = 1024  # requests of one batch under way at a time
NOT_BEGUN = -errno.ECANCELED
IOVEC = np.dtype([("address", "u8"), ("nbytes", "u8")])
_NUMBERS = {  # of io_setup, io_destroy, io_getevents, io_submit
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
}
_PREADV = 7
_IOCB = np.dtype(
    {
        # Of struct iocb what reads need; the rest is 0. Places are those of little-endian machines.
        "names": ["data", "opcode", "fd", "buffer", "count", "offset"],
        "formats": ["u8", "u2", "i4", "u8", "u8", "i8"],
        "offsets": [0, 16, 20, 24, 32, 40],
        "itemsize": 64,
    }
)
_EVENT = np.dtype([("data", "u8"), ("iocb", "u8"), ("result", "i8"), ("result2", "i8")])


class Kernel:
    """The system calls. Each raises OSError; tests put another in the place of ``kernel``."""

    def __init__(self) -> None:
        if not self.missing:
            numbers = _NUMBERS[current_platform().architecture]
            self._setup, self._destroy, self._getevents, self._submit = numbers
            self._syscall = ctypes.CDLL(None, use_errno=True).syscall
            self._syscall.restype = ctypes.c_long

    @property
    def missing(self) -> str:
        """Reason why this system does not have them, or an empty string."""
        system = current_platform()
        if system.linux_aio and system.architecture in _NUMBERS:
            return ""
        return f"not known for {system.name} on {system.architecture}"

    def setup(self, depth: int) -> int:
        """A new context for up to ``depth`` requests at a time."""
        if missing := self.missing:
            raise OSError(errno.ENOSYS, missing)
        context = ctypes.c_ulong(0)
        self._call(self._setup, depth, ctypes.addressof(context))
        return context.value

    def destroy(self, context: int) -> None:
        """Wait for all that is under way in a context and let go of it."""
        self._call(self._destroy, context)

    def submit(self, context: int, count: int, pointers: int) -> int:
        """Begin requests: how many of them, from the first on, were taken."""
        return self._call(self._submit, context, count, pointers)

    def getevents(self, context: int, least: int, most: int, events: int) -> int:
        """Wait for at least ``least`` requests; returns how many events were written."""
        return self._call(self._getevents, context, least, most, events, 0)

    def _call(self, number: int, *args: int) -> int:
        result = self._syscall(ctypes.c_long(number), *map(ctypes.c_ulong, args))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result


kernel = Kernel()
# The kernel takes 20 to 40 ms to let go of a context, so that idle ones are kept for the next read.
_idle: list[int] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def why_not() -> str:
    """Reason why Linux AIO is unavailable, or an empty string."""
    try:
        _idle.append(_take())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def read(
    fd: int,
    offsets: np.ndarray,
    vectors: np.ndarray,
    firsts: np.ndarray,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Carry requests out and wait until all are over.

    May be called from several threads. On return or exception no request is in flight.

    Args:
        fd: what to read.
        offsets: int [n], where each request begins.
        vectors: IOVEC array, the memory of the requests, one after the other; the caller holds it.
        firsts: int [n], index in ``vectors`` where those of each request begin.
        stop: asked before requests are begun; True leaves those that have not begun.

    Returns int64 [n]: bytes read, or minus the number of the error; ``NOT_BEGUN`` for what was left
    out, which is everything where the system has no more contexts to give.
    """
    results = np.full(offsets.size, NOT_BEGUN, np.int64)
    try:
        context = _take()
    except OSError:
        return results
    whole = False
    try:
        _read(context, fd, offsets, vectors, firsts, stop, results)
        whole = True
    finally:
        if whole:
            _idle.append(context)
        else:
            kernel.destroy(context)  # waits for what is under way
    return results


def _take() -> int:
    try:
        return _idle.pop()
    except IndexError:
        return kernel.setup(DEPTH)


def _read(
    context: int,
    fd: int,
    offsets: np.ndarray,
    vectors: np.ndarray,
    firsts: np.ndarray,
    stop: Callable[[], bool],
    results: np.ndarray,
) -> None:
    total = offsets.size
    requests = np.zeros(total, _IOCB)
    requests["data"] = np.arange(total)
    requests["opcode"] = _PREADV
    requests["fd"] = fd
    requests["buffer"] = vectors.ctypes.data + firsts * IOVEC.itemsize
    requests["count"] = np.diff(firsts, append=len(vectors))
    requests["offset"] = offsets
    pointers = requests.ctypes.data + np.arange(total, dtype=np.uint64) * _IOCB.itemsize
    events = np.zeros(min(total, DEPTH), _EVENT)
    begun = under_way = 0
    while True:
        if begun < total and stop():
            total = begun
        taken = 0
        if room := min(total - begun, DEPTH - under_way):
            try:
                at = pointers.ctypes.data + begun * pointers.itemsize
                taken = kernel.submit(context, room, at)
            except InterruptedError:
                continue
            except OSError as error:  # the first of them is meant
                if error.errno != errno.EAGAIN or not under_way:
                    results[begun] = -(error.errno or errno.EIO)
                    begun += 1
                    continue
            begun, under_way = begun + taken, under_way + taken
        if not under_way:
            return
        # Half of them when others are to follow: one at a time would wake this thread for each.
        least = under_way if begun == total else -(-under_way // 2)
        if 0 < taken < room:
            continue
        try:
            count = kernel.getevents(context, least, events.size, events.ctypes.data)
        except InterruptedError:
            continue
        over = events[:count]
        results[over["data"].astype(np.int64)] = over["result"]
        under_way -= count

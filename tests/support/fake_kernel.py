"""The kernel's asynchronous reads as ``os.preadv``, whatever that is just then, and as told."""

import ctypes
import errno
import itertools
import os
import threading

import numpy as np

from mlx_flash.storage import linux_aio


class FakeKernel:
    """In the place of ``aio.kernel``. What was begun is read when it is asked after, last first.

    Args:
        takes: one call begins at most so many requests.
        room: so many are under way at most; more is EAGAIN.
        gives: one call tells of at most so many that are over.
        interrupts: so many calls end with EINTR first.
        no_contexts: number of the error that asking for a context ends with.
        refuses: data -> number of the error that beginning that request ends with.
        fails: data -> number of the error that a request that has begun ends with.
    """

    def __init__(
        self,
        *,
        takes: int = 1 << 30,
        room: int = 1 << 30,
        gives: int = 1 << 30,
        interrupts: int = 0,
        no_contexts: int = 0,
        refuses: dict[int, int] | None = None,
        fails: dict[int, int] | None = None,
    ) -> None:
        self.takes, self.room, self.gives, self.interrupts = takes, room, gives, interrupts
        self.no_contexts, self.refuses, self.fails = no_contexts, refuses or {}, fails or {}
        self.under_way: dict[int, list[np.void]] = {}
        self.calls: list[tuple[str, int]] = []
        self._contexts = itertools.count(1)
        self.most = 0  # under way at a time
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def setup(self, depth: int) -> int:
        self.calls.append(("setup", depth))
        if self.no_contexts:
            raise OSError(self.no_contexts, os.strerror(self.no_contexts))
        context = next(self._contexts)
        self.under_way[context] = []
        return context

    def destroy(self, context: int) -> None:
        self.calls.append(("destroy", context))
        self._end(self.under_way.pop(context))

    def submit(self, context: int, count: int, pointers: int) -> int:
        self._maybe_interrupt()
        waiting = self.under_way[context]
        size = min(count, self.takes, self.room - len(waiting))
        if size < 1:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        taken = 0
        for pointer in np.frombuffer(memory_at(pointers, 8 * size), np.uint64):
            request = np.frombuffer(memory_at(int(pointer), 64), linux_aio._IOCB)[0].copy()
            if code := self.refuses.get(int(request["data"])):
                if taken:
                    break
                raise OSError(code, os.strerror(code))
            waiting.append(request)
            taken += 1
        self.calls.append(("submit", taken))
        self.most = max(self.most, len(waiting))
        self.begun.set()
        return taken

    def getevents(self, context: int, least: int, most: int, events: int) -> int:
        self._maybe_interrupt()
        waiting = self.under_way[context]
        if not 0 < least <= min(len(waiting), most):
            raise AssertionError(f"would wait for ever for {least} of {len(waiting)}")
        self.go.wait()
        count = min(len(waiting), most, max(self.gives, least))
        over = [waiting.pop() for _ in range(count)]
        found = np.frombuffer(memory_at(events, 32 * count), linux_aio._EVENT)
        found["result"] = self._end(over)
        found["data"] = [request["data"] for request in over]
        self.calls.append(("getevents", count))
        return count

    def _maybe_interrupt(self) -> None:
        if self.interrupts:
            self.interrupts -= 1
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    def _end(self, requests: list[np.void]) -> list[int]:
        return [self._read(request) for request in requests]

    def _read(self, request: np.void) -> int:
        if code := self.fails.get(int(request["data"])):
            return -code
        count = int(request["count"])
        vectors = np.frombuffer(memory_at(int(request["buffer"]), 16 * count), linux_aio.IOVEC)
        buffers = [memory_at(int(v["address"]), int(v["nbytes"])) for v in vectors]
        try:
            return os.preadv(int(request["fd"]), buffers, int(request["offset"]))
        except OSError as error:
            return -error.errno


def memory_at(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def use(monkeypatch, kernel: FakeKernel) -> FakeKernel:
    """Put a kernel in the place of the real one, with no contexts made yet."""
    monkeypatch.setattr(linux_aio, "kernel", kernel)
    monkeypatch.setattr(linux_aio, "_idle", [])
    return kernel

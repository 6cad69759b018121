"""Systems and machines other than the one that tests run on."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_flash.common import platform
from mlx_flash.common.platform import Darwin, Platform
from mlx_flash.storage import direct_io, linux_aio

MAC_LIBRARIES = 100_000_000  # what a fresh process with MLX takes
MAC_MEMORY = 16_000_000_000
# Of struct rusage_info_v4 in macOS' <sys/resource.h>: byte offsets, and the size of the whole.
PHYS_FOOTPRINT, LIFETIME_MAX_PHYS_FOOTPRINT, RUSAGE_BYTES = 72, 240, 296


def use_platform(monkeypatch: pytest.MonkeyPatch, system: Platform) -> Platform:
    """Let ``current_platform`` tell of another system, with no asynchronous reads kept ready."""
    monkeypatch.setattr(platform, "_platform", system)
    monkeypatch.setattr(linux_aio, "_idle", [])
    return system


def fix_memory(
    monkeypatch: pytest.MonkeyPatch, process: int | None = None, machine: int | None = None
) -> None:
    """This system, with a process and a machine of so many bytes; None for the true figure."""
    system = platform.current_platform()
    if process is not None:
        monkeypatch.setattr(system, "process_bytes", lambda: process)
    if machine is not None:
        monkeypatch.setattr(system, "machine_bytes", lambda: machine)


class FakeLibSystem:
    """What ``Darwin`` calls of macOS' libSystem, for one process.

    Its footprint is that of the libraries and of what MLX holds; the peak is the highest ever
    asked for or reached by MLX.
    """

    def __init__(self, footprint: Callable[[], int] | None = None) -> None:
        self.footprint = footprint or (
            lambda: MAC_LIBRARIES + mx.get_active_memory() + mx.get_cache_memory()
        )
        self.peak = 0
        self.refuses = False  # proc_pid_rusage fails, as in a sandbox
        self.values = {
            "hw.memsize": MAC_MEMORY.to_bytes(8, "little"),
            "hw.model": b"Mac14,9\0",
            "machdep.cpu.brand_string": b"Apple M2 Pro\0",
        }
        self.relieved = 0

    def proc_pid_rusage(self, pid: ctypes.c_int, flavor: ctypes.c_int, at: ctypes.c_void_p) -> int:
        assert (pid.value, flavor.value) == (os.getpid(), 4)
        if self.refuses:
            return -1
        now = self.footprint()
        self.peak = max(self.peak, now, MAC_LIBRARIES + mx.get_peak_memory())
        raw = (ctypes.c_uint8 * RUSAGE_BYTES).from_address(at.value)
        ctypes.memset(raw, 0x5A, RUSAGE_BYTES)  # any other field is not what is asked for
        for offset, value in ((PHYS_FOOTPRINT, now), (LIFETIME_MAX_PHYS_FOOTPRINT, self.peak)):
            raw[offset : offset + 8] = value.to_bytes(8, "little")
        return 0

    def sysctlbyname(self, name, out, size, new, new_size) -> int:
        assert new is None and new_size.value == 0
        value = self.values.get(name.decode())
        if value is None or len(value) > size._obj.value:
            return -1
        ctypes.memmove(out, value, len(value))
        size._obj.value = len(value)
        return 0

    def malloc_zone_pressure_relief(self, zone, goal) -> int:
        assert zone is None and goal.value == 0
        self.relieved += 1
        return 0


class FakeDarwin(Darwin):
    """macOS on whatever machine this is, by a fake libSystem."""

    def __init__(self, library: FakeLibSystem | None = None) -> None:
        super().__init__(library or FakeLibSystem())

    @property
    def architecture(self) -> str:
        return "arm64"


class FakeFcntl:
    """The module fcntl of macOS, as far as files are opened with it: knows F_NOCACHE."""

    def __init__(self) -> None:
        self.uncached: list[int] = []  # descriptors

    def __getattr__(self, name: str):
        return getattr(fcntl, name)

    def fcntl(self, fd: int, command: int, argument: int = 0) -> int:
        if command != direct_io.F_NOCACHE:
            return fcntl.fcntl(fd, command, argument)
        assert argument == 1
        self.uncached.append(fd)
        return 0


def use_darwin(monkeypatch: pytest.MonkeyPatch) -> FakeDarwin:
    """macOS' rules: its memory figures, F_NOCACHE, no O_DIRECT, no asynchronous reads."""
    monkeypatch.setattr(direct_io, "fcntl", FakeFcntl())
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    return use_platform(monkeypatch, FakeDarwin())

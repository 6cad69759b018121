"""The operating system and the machine: memory figures, cache folder, name, ways to read files.

``current_platform()`` is the one object that tells; tests put another in its place
(tests/support/platforms.py). Nothing else in the package asks which system it runs on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any, Literal

from platformdirs.macos import MacOS
from platformdirs.unix import Unix

APPLICATION = "mlx_flash"


class Platform:
    """A Unix of which nothing else is known; base of ``Linux`` and ``Darwin``.

    Attributes:
        name: as ``sys.platform`` has it.
        uncached_reads: how a file is opened for reads past the page cache; "" for not at all.
        linux_aio: whether the asynchronous reads of Linux may be tried.
        huge_pages: whether memory on huge pages may be asked for.
    """

    name: str = sys.platform
    uncached_reads: Literal["O_DIRECT", "F_NOCACHE", ""] = ""
    linux_aio: bool = False
    huge_pages: bool = False
    _rss_unit = 1024  # bytes that getrusage counts in

    @property
    def architecture(self) -> str:
        """The processor's instruction set, such as "x86_64" or "arm64"."""
        return platform.machine()

    def process_bytes(self) -> int:
        """Memory of this process now, libraries included; never too low.

        Where the system does not tell, the peak stands for it.
        """
        return self.peak_process_bytes()

    def peak_process_bytes(self) -> int:
        """The most memory that this process has had, libraries included."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * self._rss_unit

    def machine_bytes(self) -> int:
        """Physical memory of the machine."""
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def trim(self) -> None:
        """Return freed memory to the system, so that ``process_bytes`` does not count it."""
        gc.collect()

    def machine_name(self) -> str:
        """Model, processor, cores and system, for people and for keys of what was measured."""
        cores, system, release = os.cpu_count(), platform.system(), platform.release()
        return f"{self._model()}, {cores} cores, {system} {release}"

    def _model(self) -> str:
        return platform.processor() or self.architecture

    def cache_folder(self) -> Path:
        """Where this package keeps what may be lost; not made."""
        return Unix(APPLICATION).user_cache_path


class Linux(Platform):
    """Linux: /proc, O_DIRECT, io_submit(2), transparent huge pages."""

    name = "linux"
    uncached_reads = "O_DIRECT"
    linux_aio = sys.maxsize > 2**32
    huge_pages = hasattr(mmap, "MADV_HUGEPAGE")
    _status = Path("/proc/self/status")

    def process_bytes(self) -> int:
        return self._field("VmRSS")

    def peak_process_bytes(self) -> int:
        return self._field("VmHWM")

    def _field(self, name: str) -> int:
        for line in self._status.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(name)

    def trim(self) -> None:
        super().trim()
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if release:
            release(0)

    def _model(self) -> str:
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        return super()._model()


class RusageInfo(ctypes.Structure):
    """``struct rusage_info_v4`` of macOS' <sys/resource.h>: a uuid, then 64-bit numbers."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        *(
            (field, ctypes.c_uint64)
            for field in (
                "user_time",
                "system_time",
                "pkg_idle_wkups",
                "interrupt_wkups",
                "pageins",
                "wired_size",
                "resident_size",
                "phys_footprint",
                "proc_start_abstime",
                "proc_exit_abstime",
                "child_user_time",
                "child_system_time",
                "child_pkg_idle_wkups",
                "child_interrupt_wkups",
                "child_pageins",
                "child_elapsed_abstime",
                "diskio_bytesread",
                "diskio_byteswritten",
                "cpu_time_qos_default",
                "cpu_time_qos_maintenance",
                "cpu_time_qos_background",
                "cpu_time_qos_utility",
                "cpu_time_qos_legacy",
                "cpu_time_qos_user_initiated",
                "cpu_time_qos_user_interactive",
                "billed_system_time",
                "serviced_system_time",
                "logical_writes",
                "lifetime_max_phys_footprint",
                "instructions",
                "cycles",
                "billed_energy",
                "serviced_energy",
                "interval_max_phys_footprint",
                "runnable_time",
            )
        ),
    )


class Darwin(Platform):
    """macOS: the footprint that Activity Monitor shows, F_NOCACHE, sysctl.

    Args:
        library: libSystem; tests give another.
    """

    name = "darwin"
    uncached_reads = "F_NOCACHE"
    _rss_unit = 1
    _RUSAGE_INFO_V4 = 4

    def __init__(self, library: Any = None) -> None:
        self._library = ctypes.CDLL(None) if library is None else library

    def process_bytes(self) -> int:
        return self._rusage("phys_footprint") or super().process_bytes()

    def peak_process_bytes(self) -> int:
        return self._rusage("lifetime_max_phys_footprint") or super().peak_process_bytes()

    def _rusage(self, field: str) -> int:
        """A number of ``RusageInfo`` of this process; 0 where the system does not give it."""
        info = RusageInfo()
        at = ctypes.c_void_p(ctypes.addressof(info))
        pid, flavor = ctypes.c_int(os.getpid()), ctypes.c_int(self._RUSAGE_INFO_V4)
        failed = self._library.proc_pid_rusage(pid, flavor, at)
        return 0 if failed else getattr(info, field)

    def machine_bytes(self) -> int:
        return int.from_bytes(self._sysctl("hw.memsize"), "little") or super().machine_bytes()

    def trim(self) -> None:
        super().trim()
        self._library.malloc_zone_pressure_relief(None, ctypes.c_size_t(0))  # of all zones, all

    def _model(self) -> str:
        """Such as "Apple M2 Pro, Mac14,9": machines of one processor differ in their disks."""
        names = [
            self._sysctl(name).split(b"\0")[0].decode(errors="replace")
            for name in ("machdep.cpu.brand_string", "hw.model")
        ]
        return ", ".join(filter(None, names)) or super()._model()

    def _sysctl(self, name: str) -> bytes:
        """A value of the kernel's; nothing where it has none of that name."""
        buffer, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
        failed = self._library.sysctlbyname(
            name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)
        )
        return b"" if failed else buffer.raw[: size.value]

    def cache_folder(self) -> Path:
        return MacOS(APPLICATION).user_cache_path


_platform = {"linux": Linux, "darwin": Darwin}.get(sys.platform, Platform)()


def current_platform() -> Platform:
    """The system that this process runs on."""
    return _platform

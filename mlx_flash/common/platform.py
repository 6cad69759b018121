"""What the operating system says this process and this machine use.

Knows: Linux's /proc and getrusage. Does not know: what MLX counts for itself. On macOS the current
footprint is not to be had without other packages, so the peak stands for it (never too low).
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def current(platform: str = sys.platform) -> int:
    """Bytes resident now, libraries included."""
    return _status("VmRSS") if platform == "linux" else peak(platform)


def peak(platform: str = sys.platform) -> int:
    """The most bytes that were ever resident in this process."""
    if platform == "linux":
        return _status("VmHWM")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform == "darwin" else most * 1024


def machine() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def trim(platform: str = sys.platform) -> None:
    """Give memory that was freed back to the operating system, so that ``current`` tells."""
    gc.collect()
    if platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if release:
            release(0)

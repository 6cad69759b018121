"""Opening files for reads past the page cache.

Knows: how systems and file systems take direct I/O or refuse it. Does not know: what is read.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys

from .row_layout import PAGE

REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems say that they have no direct I/O


def open_direct(
    path: os.PathLike[str], platform: str = sys.platform, grain: int = PAGE
) -> tuple[int, bool]:
    """Open for reading past the page cache: (descriptor, whether the file system agreed).

    Args:
        path: file to open.
        platform: a seam for tests: macOS has F_NOCACHE, Linux O_DIRECT.
        grain: offsets, lengths and addresses of the reads to come are multiples of this.
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
        if error.errno not in REFUSALS:
            raise
        return os.open(path, os.O_RDONLY), False
    try:
        if flag and _direct_read_works(fd, grain):
            return fd, True
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return os.open(path, os.O_RDONLY), False


def _direct_read_works(fd: int, grain: int) -> bool:
    """Some file systems take the flag and then refuse the reads, or those of small grain."""
    with mmap.mmap(-1, 2 * grain) as memory, memoryview(memory)[grain:] as odd:
        try:
            os.preadv(fd, [odd], grain)
        except OSError as error:
            if error.errno in REFUSALS:
                return False
            raise
    return True

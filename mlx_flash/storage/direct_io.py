"""Opening files for reads past the page cache, where system and file system agree."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from mlx_flash.common.platform import current_platform

from .row_layout import PAGE

REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems say that they have no direct I/O
F_NOCACHE = getattr(fcntl, "F_NOCACHE", 48)


def open_direct(path: os.PathLike[str], grain: int = PAGE) -> tuple[int, bool]:
    """Open for reading past the page cache: (descriptor, whether the file system agreed).

    Where it does not agree, reads of the descriptor go through the page cache.

    Args:
        path: file to open.
        grain: offsets, lengths and addresses of the reads to come are multiples of this.
    """
    how = current_platform().uncached_reads
    if how == "F_NOCACHE":
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.fcntl(fd, F_NOCACHE, 1)
        except OSError:
            return fd, False
        return fd, True
    if how == "O_DIRECT" and (fd := _open_o_direct(path, grain)) is not None:
        return fd, True
    return os.open(path, os.O_RDONLY), False


def _open_o_direct(path: os.PathLike[str], grain: int) -> int | None:
    """A descriptor with O_DIRECT whose reads work; None where the file system refuses."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in REFUSALS:
            return None
        raise
    try:
        works = _direct_read_works(fd, grain)
    except BaseException:
        os.close(fd)
        raise
    if not works:
        os.close(fd)
        return None
    return fd


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

"""Files read past the page cache, where system and file system agree."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

from mlx_flash.common.platform import current_platform
from mlx_flash.errors import DamagedError, ReadError

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


class OpenedFile:
    """A file that rows are read from: past the page cache, and plainly where that cannot be.

    Args:
        path: file to open.
        grain: offsets, lengths and addresses of most reads are multiples of this many bytes.
        direct: False reads through the page cache.

    Attributes:
        fd: descriptor to read from.
        direct: whether its reads go past the page cache.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: Path, grain: int, direct: bool = True) -> None:
        self.path, self.grain = path, grain
        self.fd = self._plain_fd = os.open(path, os.O_RDONLY)
        self._written = self._stamp()
        self.direct = False
        if direct:
            try:
                self.fd, self.direct = open_direct(path, grain=grain)
            except BaseException:
                self.close()
                raise

    def read(
        self,
        buffers: list[memoryview],
        offset: int,
        nbytes: int,
        place: Callable[[int], str],
        done: int = 0,
    ) -> None:
        """Read until ``nbytes`` are there; a short read is continued where it stopped.

        Args:
            buffers: where the bytes go, one behind the other.
            offset: in the file, of the first byte.
            place: names what lies at an offset, for errors.
            done: bytes that are there already.

        Raises:
            ReadError: the disk failed.
            DamagedError: the file ends before.
        """
        while done < nbytes:
            at = offset + done
            fd = self._plain_fd if done % self.grain else self.fd
            try:
                got = os.preadv(fd, _after(buffers, done), at)
            except InterruptedError:
                continue
            except OSError as error:
                raise ReadError(
                    error.errno,
                    f"reading {self.path}, {place(at)}, offset {at}, {nbytes - done} bytes: "
                    f"{error.strerror}",
                ) from error
            if got == 0:
                raise DamagedError(
                    f"{self.path} ended at byte {at} inside {place(at)}; it was cut while in use"
                )
            done += got

    def check_unchanged(self, place: Callable[[int], str]) -> None:
        """Raise DamagedError where the file was written to since it was opened.

        Its size and time are those of the file that is open: another one that was given its name,
        as every writer of this package does it, is not looked at and does no harm.

        Args:
            place: names what lies at an offset, for errors.
        """
        size, _ = found = self._stamp()
        if size < self._written[0]:
            raise DamagedError(
                f"{self.path} ended at byte {size} inside {place(size)}; it was cut while in use"
            )
        if found != self._written:
            raise DamagedError(
                f"{self.path} was written to while it was in use, so its rows are not those of the "
                "model any more; load the model again, after mlx_flash verify"
            )

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._plain_fd)
        return found.st_size, found.st_mtime_ns

    def close(self) -> None:
        """Close it; no read may be under way."""
        for fd in {self.fd, self._plain_fd} - {-1}:
            os.close(fd)
        self.fd = self._plain_fd = -1


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """The buffers without their first ``done`` bytes."""
    if done == 0:
        return buffers
    rest = list(buffers)
    while done >= len(rest[0]):
        done -= len(rest.pop(0))
    rest[0] = rest[0][done:]
    return rest

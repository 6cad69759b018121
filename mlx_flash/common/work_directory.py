"""A directory for work that takes long: one process at a time, and the next run goes on in it.

A marker file in it holds the key of the work, which names its source and settings. The same key
takes over what an interrupted run left; another key begins anew. A directory without a marker was
not made here and is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_flash.errors import FlashError

from .files import FULL, atomic_write, is_temporary, written
from .sizes import show

MARGIN_BYTES = 64 << 20  # for small files and the file system's own


@dataclass(frozen=True)
class WorkDirectory:
    """Where one kind of work keeps what is done so far.

    Args:
        path: the directory; ``claim`` makes it.
        marker: name of the file that holds the key.
        work: what is being done, for messages: "conversion".
        error: raised with those messages.
        note: added to the message that it cannot be made.
    """

    path: Path
    marker: str
    work: str
    error: type[FlashError]
    note: str = ""

    @contextmanager
    def claim(self, key: str, before: Callable[[], None] | None = None) -> Iterator[Path]:
        """The directory for this process alone, with what an earlier run of the same key left.

        At the end a directory in which nothing was done is removed; any other stays, whatever
        ended the block, unless the block itself renamed or removed it.

        Args:
            key: of the work; what another one left is removed.
            before: called once the directory is locked, before anything in it changes.

        Raises:
            error: the directory is somebody else's, another process works in it, or a write to
                the disk failed.
        """
        lock = self._open()
        try:
            self._take(lock)
            try:
                if before:
                    before()
                if self._key() != key:
                    self.empty()
                    atomic_write(self.path / self.marker, key)
                yield self.path
            finally:
                self._remove_if_nothing_done(lock)
        except OSError as error:
            if isinstance(error, FlashError) or error.errno is None:
                raise
            room = "make room and " if error.errno in FULL else ""
            raise self.error(
                f"writing {written(error) or self.path} failed: {error.strerror}; "
                f"{room}run the same command again, it goes on where it stopped"
            ) from error
        finally:
            os.close(lock)

    def empty(self) -> None:
        """Remove all that is in it but the marker."""
        for file in self.path.iterdir():
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            elif file.name != self.marker:
                file.unlink()

    def remove(self) -> None:
        """Remove it, its marker last: cut off, it is still known as ours."""
        self.empty()
        (self.path / self.marker).unlink(missing_ok=True)
        self.path.rmdir()

    def check_disk(self, total: int, instead: str, target: Path | None = None) -> None:
        """Raise ``error`` unless the disk has room for what is not written yet of ``total`` bytes.

        Args:
            instead: what could be done but for making room.
            target: what the message names; None for the directory itself.
        """
        there = 0
        if self.path.is_dir():
            there = sum(f.stat().st_blocks * 512 for f in self.path.iterdir() if f.is_file())
        free = shutil.disk_usage(existing(self.path)).free
        if (needed := total + MARGIN_BYTES - there) > free:
            raise self.error(
                f"not enough disk for {target or self.path}: {show(needed)} needed, "
                f"{show(free)} free; make room or {instead}"
            )

    def _open(self) -> int:
        """Make the directory if it is not there; a descriptor of it."""
        try:
            if not self._is_ours():
                raise self.error(f"{self.path} is in the way and not made by mlx_flash; move it")
            self.path.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if isinstance(error, FlashError):
                raise
            raise self.error(f"cannot write {self.path}: {error.strerror}{self.note}") from error

    def _is_ours(self) -> bool:
        """Whether it is nothing yet, empty but for what a kill left, or has a marker."""
        if self.path.is_symlink() or not self.path.is_dir():
            return not (self.path.is_symlink() or self.path.exists())
        if (self.path / self.marker).is_file():
            return True
        return all(map(is_temporary, self.path.iterdir()))

    def _take(self, lock: int) -> None:
        """Lock the directory itself: it stays the same when it is renamed."""
        with contextlib.suppress(OSError):  # a file system without locks: go on without
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self.error(
                    f"another {self.work} is writing {self.path}; wait for it"
                ) from None
        if not self._is(lock):
            raise self.error(
                f"another {self.work} has just finished {self.path}; look at its result"
            )

    def _is(self, lock: int) -> bool:
        """Whether the directory that was locked still has this name."""
        try:
            return os.path.samestat(os.fstat(lock), self.path.stat())
        except FileNotFoundError:
            return False

    def _key(self) -> str | None:
        marker = self.path / self.marker
        return marker.read_text(errors="replace") if marker.is_file() else None

    def _remove_if_nothing_done(self, lock: int) -> None:
        with contextlib.suppress(OSError):
            if not self._is(lock):
                return  # renamed, removed, or another process's by now
            if [file.name for file in self.path.iterdir()] == [self.marker]:
                (self.path / self.marker).unlink()
            self.path.rmdir()  # fails, as it should, where there is something in it


def existing(path: Path) -> Path:
    """The nearest of ``path`` and the directories above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists() or p == p.parent)

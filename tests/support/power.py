"""What a power loss leaves of a directory: names, and of each file what was flushed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


class PowerLoss:
    """Takes note of what ``os.fsync`` has brought to the disk.

    A loss is the worst that file systems allow which keep names in order: every file has the
    name and the length that it had last, and zeros for all that was not flushed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._flushed: dict[tuple[int, int], bytes] = {}
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        stat = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_file():
            self._flushed[stat.st_dev, stat.st_ino] = path.read_bytes()

    def strikes(self, directory: Path, after: Path) -> Path:
        """Make ``after``, what is left of ``directory`` if power went now."""
        shutil.copytree(directory, after)
        for file in directory.iterdir():
            stat = file.stat()
            kept = self._flushed.get((stat.st_dev, stat.st_ino), b"")[: stat.st_size]
            (after / file.name).write_bytes(kept.ljust(stat.st_size, b"\0"))
        return after

"""Disks with the rules of direct I/O, what a read of them must give, what a power loss leaves."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.storage import direct_io
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import PAGE, Part, RowLayout

NAMES = ("gate", "up", "down")
LAYOUTS = {
    "staged": RowLayout.plan(NAMES, "BF16", 64),
    "staged, parts unlike": RowLayout(
        (Part("a", "F32", (7,), 0), Part("b", "BF16", (50,), 28), Part("c", "U8", (3,), 200)),
        512,
        512,
    ),
    "scattered": RowLayout.plan(NAMES[1:], "BF16", 2048),
    "scattered, short": RowLayout.plan(NAMES, "BF16", 1000),
    "scattered, row padded": RowLayout.plan(NAMES, "BF16", 2560),
    "scattered, parts padded": RowLayout.plan(NAMES, "F32", 1026),
}
ROWS = [40, 23]


def slots_for(layout: RowLayout, capacity: int) -> list[np.ndarray]:
    """Page-aligned memory for the parts of so many rows, filled with 0xAA."""
    out = []
    for extent in layout.extents:
        raw = np.full(capacity * extent + PAGE, 0xAA, np.uint8)
        skip = -raw.ctypes.data % PAGE
        out.append(raw[skip : skip + capacity * extent].reshape(capacity, extent))
    return out


def assert_read(
    layout: RowLayout,
    block: np.ndarray,
    rows: np.ndarray,
    slots: np.ndarray,
    out: list[np.ndarray],
) -> None:
    """Slots hold the rows, padding of parts included, and all others are untouched."""
    untouched = np.setdiff1d(np.arange(len(out[0])), slots)
    for part, extent, array in zip(layout.parts, layout.extents, out, strict=True):
        expected = block[rows, part.offset : part.offset + extent]
        np.testing.assert_array_equal(array[slots], expected)
        assert (array[untouched] == 0xAA).all()


def read_all(reader: RowReader, layer: int = 0) -> list[np.ndarray]:
    count = reader.file.layers[layer].rows
    out = slots_for(reader.file.layout, count)
    reader.read(layer, np.arange(count), np.arange(count), out)
    return out


# Direct I/O


class StrictDisk:
    """``os.preadv`` over descriptors that, like O_DIRECT, take nothing but whole sectors.

    Where ``most`` is set a read returns at most so many bytes, and what lies behind them in the
    buffers is spoilt.
    """

    def __init__(self, monkeypatch, sector: int = 512, most: int | None = None) -> None:
        self.sector, self.most = sector, most
        self.direct: set[int] = set()
        self.refused = 0
        self.used: list[int] = []  # the descriptor of each read
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(direct_io, "open_direct", self.open)

    def open(self, path: os.PathLike[str], grain: int = PAGE) -> tuple[int, bool]:
        fd = os.open(path, os.O_RDONLY)
        self.direct.add(fd)
        return fd, True

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.used.append(fd)
        arrays = [np.frombuffer(b, np.uint8) for b in buffers]
        odd = [x for a in arrays for x in (a.ctypes.data, a.size)] + [offset]
        if fd in self.direct and any(n % self.sector for n in odd):
            self.refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        got = self._real(fd, buffers, offset)
        if self.most is None:
            return got
        left = self.most
        for array in arrays:
            array[max(0, left) :] = 0xEE
            left -= array.size
        return min(got, self.most)


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

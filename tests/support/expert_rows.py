"""Row files of experts: long rows of two layouts, and reads that wait for a word."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_file import RowFile
from mlx_flash.storage.row_layout import SECTOR, RowLayout
from mlx_flash.storage.row_writer import RowFileWriter

# As experts are: packed numbers, scales, biases of three matrices.
EXPERT = RowLayout.of(
    [
        (f"{name}.{kind}", dtype, shape)
        for name in ("gate", "up", "down")
        for kind, dtype, shape in (
            ("weight", "U32", (64, 64)),
            ("scales", "BF16", (64, 8)),
            ("biases", "BF16", (64, 8)),
        )
    ],
    SECTOR,
)
LONGER = RowLayout.of([("a", "F32", (100, 128)), ("b", "BF16", (64, 64))], SECTOR)
ROWS = [6, 4, 9]
LAYOUTS = [EXPERT, LONGER, EXPERT]


def make(path, layouts=LAYOUTS, rows=ROWS, unit="expert"):
    """A file of layers of several layouts, opened, and its layers' bytes."""
    rng = np.random.default_rng(0)
    layers = []
    for layout, count in zip(layouts, rows, strict=True):
        block = np.zeros((count, layout.stride), np.uint8)
        layout.pack([rng.integers(0, 256, (count, p.nbytes)) for p in layout.parts], block)
        layers.append(block)
    writer = RowFileWriter(path, layouts, rows, "a source", unit)
    for i, block in enumerate(layers):
        writer.write(i, [block])
    writer.close()
    return RowFile(path), layers


class Gate:
    """os.preadv that waits for a word, and tells that it was called."""

    def __init__(self, real: Callable[..., int]) -> None:
        self.real, self.word, self.begun = real, threading.Event(), threading.Event()
        self.offsets: list[int] = []
        self.held = range(0)

    def __call__(self, fd, buffers, offset):
        self.offsets.append(offset)
        if offset in self.held:
            self.begun.set()
            self.word.wait()
        return self.real(fd, buffers, offset)


@contextmanager
def gated_reader(path, monkeypatch) -> Iterator[tuple]:
    """(reader, gate, layers' bytes): reads of layer 0 wait for the gate's word."""
    file, layers = make(path / "rows")
    reader = RowReader(file, threads=4, gap_bytes=0, engine="threads")
    gate = Gate(os.preadv)
    gate.held = range(file.layers[0].offset, file.layers[1].offset)
    monkeypatch.setattr(os, "preadv", gate)
    yield reader, gate, layers
    gate.word.set()
    reader.close()


def ask(reader, layer, rows, slots, out, behind=False):
    read = reader.prepare(np.array(rows), np.array(slots), out, layer)
    return reader.submit(layer, read, behind)

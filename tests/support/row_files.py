"""Row files of random numbers, whole and damaged."""

import json
from pathlib import Path

import numpy as np

from mlx_flash.storage.row_file import RowFile
from mlx_flash.storage.row_layout import RowLayout
from mlx_flash.storage.row_writer import RowFileWriter


def numbers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random finite numbers of a safetensors dtype as uint8 [*shape, itemsize]."""
    if dtype == "U8":
        return rng.integers(0, 256, shape, np.uint8)
    values = rng.standard_normal(shape).astype(np.float32)
    if dtype == "BF16":
        return np.ascontiguousarray(values.view(np.uint16)[..., 1::2]).view(np.uint8)
    return values.view(np.uint8) if dtype == "F32" else values.astype(np.float16).view(np.uint8)


def content(layout: RowLayout, rows: list[int], seed: int = 0) -> list[np.ndarray]:
    """What ``make`` writes: for each layer uint8 [rows, stride], random numbers, zero padding."""
    rng = np.random.default_rng(seed)
    layers = []
    for count in rows:
        block = np.zeros((count, layout.stride), np.uint8)
        layout.pack([numbers(rng, p.dtype, (count, p.width)) for p in layout.parts], block)
        layers.append(block)
    return layers


def make(
    path: Path, layout: RowLayout, rows: list[int], seed: int = 0
) -> tuple[RowFile, list[np.ndarray]]:
    """A row file of random numbers, opened, and its layers' bytes."""
    layers = content(layout, rows, seed)
    writer = RowFileWriter(path, layout, rows, "a source")
    for i, block in enumerate(layers):
        writer.write(i, [block])
    writer.close()
    return RowFile(path), layers


# Files that are not what they should be


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 0xFF]))


def header_of(path: Path) -> tuple[dict, int]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), 8 + size


def with_header(path: Path, header: object, out: Path) -> Path:
    """A copy of a row file with another header of the same length."""
    _, start = header_of(path)
    text = json.dumps(header).encode()
    size = -(-(8 + len(text)) // start) * start - 8
    out.write_bytes(size.to_bytes(8, "little") + text.ljust(size) + path.read_bytes()[start:])
    return out

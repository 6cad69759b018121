"""What a row file is: how it is laid out, written, opened and checked.

A row holds all that one unit of an FFN needs; for a neuron its gate row, its up row and its down
column (row-column bundling, LLM in a flash, section 3.2). The file is a plain safetensors file with
one tensor per layer, ``layers.{i}.rows``; data start on a page and the row stride is a multiple of
the alignment, so that every row can be read by one aligned request.

Knows: bytes, offsets, hashes. Does not know: MLX, what the numbers mean, who reads them or when.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DamagedError, RowFileError

FORMAT = "mlx_flash.rows"
FORMAT_VERSION = 1
PAGE = 4096
SECTOR = 512  # direct I/O on Linux wants addresses, lengths and offsets in multiples of this
MAX_PADDING = 1 / 8  # share of a row that padding may add before a smaller alignment is taken
MAX_HEADER = 1 << 26
PENDING = "0" * 64
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "U32": 4}


@dataclass(frozen=True)
class Part:
    """One part of a row: ``width`` numbers of ``dtype`` (a safetensors name) at byte ``offset``."""

    name: str
    dtype: str
    width: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.width * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class RowLayout:
    """How the bytes of a row are arranged. ``stride`` counts bytes from one row to the next."""

    parts: tuple[Part, ...]
    alignment: int
    stride: int

    @classmethod
    def plan(
        cls, names: Sequence[str], dtype: str, width: int, alignment: int | None = None
    ) -> RowLayout:
        """Lay out parts of equal width.

        Args:
            names: part names in the order in which they stand in a row.
            dtype: safetensors dtype of every part.
            width: numbers in a part, that is d_model.
            alignment: bytes the stride is a multiple of; None takes a page, or a sector where
                padding to a page would add more than an eighth.

        Parts begin on sectors where that padding, too, stays below an eighth: only then can one
        direct request scatter a row over several places in memory.
        """
        raw = width * ITEMSIZE[dtype]
        padded = _round_up(raw, SECTOR)
        step = padded if padded <= raw * (1 + MAX_PADDING) else raw
        used = step * (len(names) - 1) + raw
        if alignment is None:
            alignment = PAGE
            if _round_up(used, PAGE) > raw * len(names) * (1 + MAX_PADDING):
                alignment = SECTOR
        parts = tuple(Part(name, dtype, width, i * step) for i, name in enumerate(names))
        return cls(parts, alignment, _round_up(step * len(names), alignment))

    @property
    def extents(self) -> tuple[int, ...]:
        """Bytes that a slot holds of each part: whole sectors where the layout scatters."""
        if not self.scatters:
            return tuple(part.nbytes for part in self.parts)
        return tuple(_round_up(part.nbytes, SECTOR) for part in self.parts)

    @property
    def scatters(self) -> bool:
        """Whether direct I/O can put each part of a row into a place of its own."""
        at = 0
        for part in self.parts:
            if part.offset != at:
                return False
            at += _round_up(part.nbytes, SECTOR)
        return at <= self.stride and self.stride % SECTOR == 0

    @property
    def ideal_bytes(self) -> int:
        """Bytes of a row without padding."""
        return sum(part.nbytes for part in self.parts)

    def pack(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Write rows into ``out`` [rows, stride] uint8 from one uint8 [rows, nbytes] per part."""
        for part, data in zip(self.parts, parts, strict=True):
            out[:, part.offset : part.offset + part.nbytes] = data

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": [asdict(part) for part in self.parts],
            "alignment": self.alignment,
            "stride": self.stride,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RowLayout:
        parts = tuple(Part(**part) for part in data["parts"])
        layout = cls(parts, int(data["alignment"]), int(data["stride"]))
        inside = all(
            part.dtype in ITEMSIZE and 0 <= part.offset <= layout.stride - part.nbytes
            for part in parts
        )
        if not parts or not inside or layout.alignment < 1 or layout.stride % layout.alignment:
            raise ValueError(f"parts do not fit a row: {data}")
        return layout


@dataclass(frozen=True)
class Layer:
    """Where a layer's rows are: byte ``offset`` in the file, number of ``rows``."""

    offset: int
    rows: int


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _header(layout: RowLayout, rows: Sequence[int], source: str, hashes: Sequence[str]) -> bytes:
    dtype = layout.parts[0].dtype
    unpadded = layout.stride == layout.ideal_bytes and len({p.dtype for p in layout.parts}) == 1
    item = ITEMSIZE[dtype] if unpadded else 1
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "unit": "neuron",
            "layout": json.dumps(layout.to_json()),
            "source": source,
            "sha256": json.dumps(list(hashes)),
        }
    }
    start = 0
    for i, count in enumerate(rows):
        stop = start + count * layout.stride
        header[f"layers.{i}.rows"] = {
            "dtype": dtype if unpadded else "U8",
            "shape": [count, layout.stride // item],
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    size = _round_up(8 + len(text), PAGE) - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def file_bytes(layout: RowLayout, rows: Sequence[int], source: str) -> int:
    """Size in bytes of the row file that these layers make."""
    return len(_header(layout, rows, source, [PENDING] * len(rows))) + layout.stride * sum(rows)


class RowFile:
    """An existing row file, checked from its header and size alone.

    Raises:
        RowFileError: not a row file, or one of a later format version.
        DamagedError: the file ends before its rows do.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        header, data_start = _read_header(self.path)
        meta = header.get("__metadata__") or {}
        if meta.get("format") != FORMAT:
            raise RowFileError(
                f"{self.path} is not a row file: its metadata says format "
                f"{meta.get('format')!r}, expected {FORMAT!r}; convert the model again"
            )
        version = meta.get("format_version")
        if version != str(FORMAT_VERSION):
            raise RowFileError(
                f"{self.path} has row format version {version}, this version of mlx_flash reads "
                f"{FORMAT_VERSION}; update mlx_flash or convert the model again"
            )
        try:
            self.layout = RowLayout.from_json(json.loads(meta["layout"]))
            self.source: str = meta["source"]
            self.hashes: list[str] = json.loads(meta["sha256"])
            self.layers = [
                _layer(header, i, data_start, self.layout) for i in range(len(header) - 1)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise RowFileError(
                f"{self.path} has a row file header that makes no sense ({error}); "
                "convert the model again"
            ) from error
        if len(self.hashes) != len(self.layers):
            raise RowFileError(
                f"{self.path} has {len(self.layers)} layers and {len(self.hashes)} hashes"
            )
        self.bytes = max((x.offset + x.rows * self.layout.stride for x in self.layers), default=0)
        found = self.path.stat().st_size
        if found < self.bytes:
            raise DamagedError(
                f"{self.path} is truncated: {found} bytes found, {self.bytes} expected; "
                "copy it again or convert the model again"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of all layers' hashes: what ties the file to its model directory."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def layer_bytes(self, layer: int) -> int:
        return self.layers[layer].rows * self.layout.stride

    def verify(self, layer: int, progress: Callable[[int], Any] | None = None) -> None:
        """Hash a layer's bytes again; DamagedError names the layer where the hash differs."""
        found = _hash_file_range(
            self.path, self.layers[layer].offset, self.layer_bytes(layer), progress
        )
        if found != self.hashes[layer]:
            raise DamagedError(
                f"layer {layer} of {self.path} is damaged: sha256 {found}, "
                f"expected {self.hashes[layer]}; copy the file again or convert the model again"
            )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            text = f.read(size) if 0 < size <= MAX_HEADER else b""
    except FileNotFoundError:
        raise RowFileError(f"{path} does not exist; convert the model again") from None
    try:
        if len(text) != size:
            raise ValueError("its header is cut off")
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
    except ValueError as error:
        raise RowFileError(f"{path} is not a safetensors file: {error}") from error
    return header, 8 + size


def _layer(header: dict[str, Any], i: int, data_start: int, layout: RowLayout) -> Layer:
    entry = header[f"layers.{i}.rows"]
    start, stop = entry["data_offsets"]
    rows = int(entry["shape"][0])
    if stop - start != rows * layout.stride or (data_start + start) % layout.alignment % SECTOR:
        raise ValueError(f"layers.{i}.rows has offsets {start}..{stop} for {rows} rows")
    return Layer(data_start + start, rows)


def _hash_file_range(
    path: Path, offset: int, nbytes: int, progress: Callable[[int], Any] | None = None
) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        f.seek(offset)
        while nbytes and (block := f.read(min(nbytes, 1 << 22))):
            digest.update(block)
            nbytes -= len(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def sha256_of(path: Path, progress: Callable[[int], Any] | None = None) -> str:
    """sha256 of a whole file, read in blocks."""
    return _hash_file_range(path, 0, path.stat().st_size, progress)


class RowFileWriter:
    """Writes a row file layer by layer and resumes one that was interrupted.

    A layer's hash enters the header only after its bytes are on the disk, so after a kill at any
    moment the first layer whose hash does not hold is where work goes on.

    Args:
        path: file to make or to resume; it counts as finished only when every hash is there.
        layout: of a row.
        rows: number of rows of each layer.
        source: names what is being converted and how; a file of another source is begun anew.
    """

    def __init__(self, path: Path, layout: RowLayout, rows: Sequence[int], source: str) -> None:
        self.path, self.layout, self.rows, self.source = path, layout, list(rows), source
        self.hashes = [PENDING] * len(self.rows)
        self._data_start = len(self._header_bytes())
        resumed = self._adopt()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resumed else os.O_TRUNC), 0o644)
        if not resumed:
            self._write_header()

    def next_layer(self) -> int:
        """The first layer that is still to be written; the number of layers when all are."""
        return self.hashes.index(PENDING) if PENDING in self.hashes else len(self.hashes)

    def write(self, layer: int, blocks: Iterable[np.ndarray]) -> None:
        """Write one layer from uint8 blocks [n, stride] that together hold all its rows."""
        offset = self._data_start + self.layout.stride * sum(self.rows[:layer])
        end = offset + self.layout.stride * self.rows[layer]
        digest = hashlib.sha256()
        for block in blocks:
            data = memoryview(np.ascontiguousarray(block)).cast("B")
            digest.update(data)
            while data:
                done = os.pwrite(self._fd, data, offset)
                offset += done
                data = data[done:]
        if offset != end:
            raise ValueError(f"layer {layer} got rows up to byte {offset}, expected {end}")
        os.fsync(self._fd)
        self.hashes[layer] = digest.hexdigest()
        self._write_header()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _header_bytes(self) -> bytes:
        return _header(self.layout, self.rows, self.source, self.hashes)

    def _write_header(self) -> None:
        os.pwrite(self._fd, self._header_bytes(), 0)
        os.fsync(self._fd)

    def _adopt(self) -> bool:
        """Take over the layers of an unfinished file that hold; False if there is none of ours."""
        try:
            header, _ = _read_header(self.path)
            meta = header["__metadata__"]
            hashes = json.loads(meta["sha256"])
            same = _header(self.layout, self.rows, self.source, hashes) == self._header_on_disk()
        except (RowFileError, KeyError, ValueError, TypeError):
            return False
        if not same:
            return False
        for layer, expected in enumerate(hashes):
            offset = self._data_start + self.layout.stride * sum(self.rows[:layer])
            nbytes = self.layout.stride * self.rows[layer]
            if expected == PENDING or _hash_file_range(self.path, offset, nbytes) != expected:
                break
            self.hashes[layer] = expected
        return True

    def _header_on_disk(self) -> bytes:
        with open(self.path, "rb") as f:
            return f.read(self._data_start)

"""Writing a row file: resumable, hashed, atomic."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mlx_flash.common.files import hash_file_range
from mlx_flash.errors import RowFileError

from .row_file import (
    PENDING,
    UNITS,
    each,
    fingerprint_of,
    listed,
    read_row_header,
    row_header,
)
from .row_layout import RowLayout


class RowFileWriter:
    """Writes a row file layer by layer and resumes one that was interrupted.

    A layer's hash enters the header only after its bytes are on the disk, so after a kill at any
    moment the first layer whose hash does not hold is where work goes on.

    Args:
        path: file to make or to resume; it counts as finished only when every hash is there.
        layout: of a row, one for all layers or one for each; all have the same alignment.
        rows: number of rows of each layer.
        source: names what is being converted and how; a file of another source is begun anew.
        unit: what a row is, one of ``UNITS``.
    """

    def __init__(
        self,
        path: Path,
        layout: RowLayout | Sequence[RowLayout],
        rows: Sequence[int],
        source: str,
        unit: str = UNITS[0],
    ) -> None:
        if not rows or min(rows) < 1:
            raise ValueError(f"every layer needs at least one row, got {rows}")
        self.layouts = each(layout, rows)
        if len({layout.alignment for layout in self.layouts}) > 1:
            raise ValueError("layers of one file have rows of one alignment")
        self.path, self.rows, self.source, self.unit = path, list(rows), source, unit
        self.hashes = [PENDING] * len(self.rows)
        self._data_start = len(self._header_bytes())
        resumed = self._adopt()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resumed else os.O_TRUNC), 0o644)
        try:
            if not resumed:
                self._write_header()
            elif os.fstat(self._fd).st_size > self._offset(len(self.rows)):
                os.ftruncate(self._fd, self._offset(len(self.rows)))
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        """Of the finished file; see ``fingerprint_of``."""
        return fingerprint_of(self.hashes)

    def next_layer(self) -> int:
        """The first layer that is still to be written; the number of layers when all are."""
        return self.hashes.index(PENDING) if PENDING in self.hashes else len(self.hashes)

    def write(self, layer: int, blocks: Iterable[np.ndarray]) -> None:
        """Write one layer from uint8 blocks [n, stride] that together hold all its rows."""
        offset, end = self._offset(layer), self._offset(layer + 1)
        digest = hashlib.sha256()
        for block in blocks:
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            if offset + data.size > end:
                raise ValueError(f"layer {layer} got more than its {self.rows[layer]} rows")
            digest.update(data)
            self._write_at(offset, memoryview(data))
            offset += data.size
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
        return row_header(self.layouts, self.rows, self.source, self.hashes, self.unit)

    def _offset(self, layer: int) -> int:
        before = zip(self.layouts[:layer], self.rows[:layer], strict=True)
        return self._data_start + sum(layout.stride * count for layout, count in before)

    def _write_header(self) -> None:
        self._write_at(0, memoryview(self._header_bytes()))
        os.fsync(self._fd)

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            done = os.pwrite(self._fd, data, offset)
            offset, data = offset + done, data[done:]

    def _adopt(self) -> bool:
        """Take over the sound layers of an unfinished file; False where it has another source."""
        try:
            header, _ = read_row_header(self.path)
            hashes = listed(header["__metadata__"], "sha256")
        except (RowFileError, LookupError, TypeError, ValueError):
            return False
        expected = row_header(self.layouts, self.rows, self.source, hashes, self.unit)
        if len(hashes) != len(self.rows) or self._header_on_disk() != expected:
            return False
        for layer, recorded in enumerate(hashes):
            offset, end = self._offset(layer), self._offset(layer + 1)
            if recorded == PENDING or hash_file_range(self.path, offset, end - offset) != recorded:
                break
            self.hashes[layer] = recorded
        return True

    def _header_on_disk(self) -> bytes:
        with open(self.path, "rb") as f:
            return f.read(self._data_start)

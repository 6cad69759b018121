"""How the bytes of a row are arranged: its parts, their padding, what a direct read can do with it.

Knows: sizes, offsets, alignment. Does not know: files, what the numbers mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_flash.common.sizes import round_up

PAGE = 4096
SECTOR = 512  # direct I/O on Linux wants addresses, lengths and offsets in multiples of this
MAX_PADDING = 1 / 8  # share of a row that padding may add before a smaller alignment is taken
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "U32": 4}


@dataclass(frozen=True)
class Part:
    """One part of a row: an array of ``dtype`` (a safetensors name) at byte ``offset``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def width(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

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
        """Lay out parts of equal width, d_model; see ``of``."""
        return cls.of([(name, dtype, (width,)) for name in names], alignment)

    @classmethod
    def of(
        cls,
        parts: Sequence[tuple[str, str, tuple[int, ...]]],
        alignment: int | None = None,
        pad: bool = True,
    ) -> RowLayout:
        """Lay out parts one behind the other.

        Args:
            parts: (name, safetensors dtype, shape) in the order in which they stand in a row.
            alignment: bytes the stride is a multiple of, a power of two from a sector up; None
                takes a page, or a sector where padding to a page would add more than an eighth.
            pad: let parts begin on sectors where that padding, too, stays below an eighth: only
                then can one direct request scatter a row over several places in memory.
        """
        raw = [math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in parts]
        sizes = [round_up(nbytes, SECTOR) for nbytes in raw]
        if not pad or sum(sizes) > sum(raw) * (1 + MAX_PADDING):
            sizes = raw
        if alignment is None:
            alignment = PAGE
            if round_up(sum(sizes), PAGE) > sum(raw) * (1 + MAX_PADDING):
                alignment = SECTOR
        if not _is_alignment(alignment):
            raise ValueError(f"alignment must be a power of two, at least {SECTOR}: {alignment}")
        offsets = itertools.accumulate(sizes, initial=0)
        laid = tuple(Part(*part, at) for part, at in zip(parts, offsets, strict=False))
        return cls(laid, alignment, round_up(sum(sizes), alignment))

    @property
    def extents(self) -> tuple[int, ...]:
        """Bytes that a slot holds of each part: whole sectors where the layout scatters."""
        if not self.scatters:
            return tuple(part.nbytes for part in self.parts)
        return tuple(round_up(part.nbytes, SECTOR) for part in self.parts)

    @property
    def scatters(self) -> bool:
        """Whether direct I/O can put each part of a row into a place of its own."""
        at = 0
        for part in self.parts:
            if part.offset != at:
                return False
            at += round_up(part.nbytes, SECTOR)
        return at <= self.stride and self.stride % SECTOR == 0

    @property
    def ideal_bytes(self) -> int:
        """Bytes of a row without padding."""
        return sum(part.nbytes for part in self.parts)

    def pack(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Write rows into ``out`` [rows, stride] uint8 from one uint8 [rows, nbytes] per part.

        What lies between the parts is left as it is.
        """
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
        """What ``to_json`` gave; LookupError, TypeError or ValueError for anything else."""
        parts = tuple(Part(**{**part, "shape": tuple(part["shape"])}) for part in data["parts"])
        alignment, stride = data["alignment"], data["stride"]
        numbers = [alignment, stride, *(n for part in parts for n in (*part.shape, part.offset))]
        if any(type(n) is not int for n in numbers) or not _is_alignment(alignment):
            raise ValueError(f"sizes of a row are not whole numbers or not aligned: {data!r:.200}")
        at = 0
        for part in parts:
            sound = bool(part.shape) and min(part.shape) > 0
            if part.dtype not in ITEMSIZE or not sound or part.offset < at:
                raise ValueError(f"parts of a row overlap or are of no known type: {data!r:.200}")
            at = part.offset + part.nbytes
        names = {part.name for part in parts if isinstance(part.name, str)}
        if not parts or len(names) < len(parts) or at > stride or stride % alignment:
            raise ValueError(f"parts do not fit a row: {data!r:.200}")
        return cls(parts, alignment, stride)


def _is_alignment(n: int) -> bool:
    return n >= SECTOR and n & (n - 1) == 0

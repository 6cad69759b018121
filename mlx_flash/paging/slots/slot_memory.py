"""Slots in unified memory: page-aligned arrays that the reader fills and MLX computes from.

One array per part of a row (LLM in a flash, section 3.3), since a slice of columns would be copied.
An MLX array and a numpy view share the memory, so a read from flash lands where a matmul reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_flash.errors import CacheError
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.storage import huge_pages
from mlx_flash.storage.row_layout import PAGE, RowLayout

MOST_ELEMENTS = 2**31 - 1  # of an MLX array, along one axis


def aligned_bytes(nbytes: int, dtype: mx.Dtype = mx.uint8) -> tuple[mx.array, np.ndarray]:
    """Page-aligned zeros as an MLX array, and a writable uint8 view of the same memory.

    On Linux they are on huge pages, and memory is taken only as it is written to. MLX counts
    elements in 32 bits: 2 GiB and more need a wider ``dtype`` than uint8.

    Raises:
        CacheError: it is more than one MLX array holds.
    """
    count = -(-nbytes // dtype.size)
    if count + PAGE > MOST_ELEMENTS:
        raise CacheError(f"{nbytes} bytes of slots are more than one MLX array holds")
    raw = mx.zeros((count + PAGE // dtype.size,), dtype)
    mx.eval(raw)
    skip = -np.array(raw, copy=False).ctypes.data % PAGE // dtype.size
    aligned = raw[skip : skip + count]
    mx.eval(aligned)
    view = _bytes_of(aligned)
    if mx.default_device().type == mx.DeviceType.cpu:  # a GPU's driver minds its own pages
        huge_pages.ask_for(view)
    return aligned, view


def _bytes_of(array: mx.array) -> np.ndarray:
    return np.array(array, copy=False).view(np.uint8)


def slot_bytes(layout: RowLayout, parts: Sequence[str] | None = None) -> int:
    """Memory that a slot takes for these parts of a row; None for all of them."""
    extents = zip(layout.parts, layout.extents, strict=True)
    return sum(extent for part, extent in extents if parts is None or part.name in parts)


def _spans(
    layout: RowLayout, capacity: int, parts: Sequence[str] | None
) -> dict[str, tuple[int, int]]:
    """Part -> (first byte, last byte + 1) of its slots in the memory."""
    at, found = 0, {}
    for part, extent in zip(layout.parts, layout.extents, strict=True):
        if parts is None or part.name in parts:
            start = -(-at // 8) * 8
            found[part.name] = (start, at := start + capacity * extent)
    return found


def _shaped(array: mx.array, shape: tuple[int, ...], capacity: int, stride: int) -> mx.array:
    """[capacity, *shape] over an array [capacity, stride], not copied."""
    inner = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    shaped = mx.as_strided(array, (capacity, *shape), (stride, *inner))
    mx.eval(shaped)
    return shaped


class SlotMemory:
    """Memory for some rows, one array per part.

    Args:
        layout: of the rows.
        capacity: rows.
        share: lay out the memory of this one anew, which is at least as large; None for own memory.
        parts: those to have memory for; None for all.
        unpadded: give arrays the shape of the part, [capacity, *shape], striding over the padding
            that the layout may have; else they are [capacity, width], padding included.

    Attributes:
        arrays: part -> MLX array.
        views: the same memory as uint8 arrays [capacity, extent in bytes], one for each part of the
            layout, for the reader to fill; None for parts without memory.
        nbytes: of own memory.

    Raises:
        CacheError: it is more than one MLX array holds, or than ``share`` has.
    """

    def __init__(
        self,
        layout: RowLayout,
        capacity: int,
        share: SlotMemory | None = None,
        parts: Sequence[str] | None = None,
        unpadded: bool = False,
    ) -> None:
        self.capacity = capacity
        spans = _spans(layout, capacity, parts)
        nbytes = max((stop for _, stop in spans.values()), default=0)
        if share is None:
            self._memory, view = aligned_bytes(nbytes, mx.uint64)  # counts in 32 bits
            self.nbytes = self._memory.nbytes + PAGE
        else:
            self._memory, view = share.first(nbytes)
            self.nbytes = 0
        self.arrays: dict[str, mx.array] = {}
        self.views: list[np.ndarray | None] = []
        self._spans: dict[str, tuple[int, int, mx.Dtype]] = {}
        self._joined: dict[tuple[str, str], mx.array] = {}
        for part, extent in zip(layout.parts, layout.extents, strict=True):
            if part.name not in spans:
                self.views.append(None)
                continue
            start, stop = spans[part.name]
            dtype = DTYPES[part.dtype]
            self._spans[part.name] = (start, stop, dtype)
            array = self._typed(start, stop, dtype, capacity)
            if unpadded:
                array = _shaped(array, part.shape, capacity, extent // dtype.size)
            self.arrays[part.name] = array
            self.views.append(view[start:stop].reshape(capacity, extent))

    def first(self, nbytes: int) -> tuple[mx.array, np.ndarray]:
        """The first ``nbytes`` of this memory, to be laid out another way; both then overlap."""
        if nbytes > self._memory.nbytes:
            raise CacheError(f"{self._memory.nbytes} bytes of slots cannot be shared as {nbytes}")
        part = self._memory[: -(-nbytes // self._memory.itemsize)]
        mx.eval(part)
        return part, _bytes_of(part)

    def joined(self, first: str, second: str) -> mx.array:
        """Two parts that lie behind each other as one array [2 * capacity, width], not copied."""
        if (first, second) not in self._joined:
            self._joined[first, second] = self._join(first, second)
        return self._joined[first, second]

    def _join(self, first: str, second: str) -> mx.array:
        (start, middle, dtype), (begin, stop, other) = self._spans[first], self._spans[second]
        if middle != begin or dtype != other or middle - start != stop - begin:
            raise CacheError(f"parts {first} and {second} do not lie behind each other")
        return self._typed(start, stop, dtype, 2 * self.capacity)

    def _typed(self, start: int, stop: int, dtype: mx.Dtype, rows: int) -> mx.array:
        size = self._memory.itemsize
        flat = self._memory[start // size : -(-stop // size)].view(dtype)
        array = flat[: (stop - start) // dtype.size].reshape(rows, -1)
        mx.eval(array)
        return array

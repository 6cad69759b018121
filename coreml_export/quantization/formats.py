"""Weights as fewer bits, in the forms that Core ML's ``constexpr_*`` operations decompress.

int8: one scale for each output channel. int4: one scale for each block of 32 numbers along the
input. palette4: sixteen values for each group of output channels, experimental.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 32
PALETTE_ROWS = 32  # output channels that share sixteen values
ROWS_AT_ONCE = 1 << 22  # numbers worked on at once: memory stays that of a few of them
TINY = np.float32(2**-20)
INT4_FACTORS = (1.0, 0.92, 0.84)  # of the scale that just holds the largest number of a block


@dataclass(frozen=True)
class QuantizedRows:
    """One tensor as it is stored.

    Args:
        scheme: fp16, int8, int4 or palette4.
        data: fp16 numbers, int8 codes (int4's in -8 to 7), or uint8 indices.
        scale: fp16, one for each block; None for fp16 and palettes.
        lut: fp16 [groups, 1, 16, 1] of a palette.
    """

    scheme: str
    data: np.ndarray
    scale: np.ndarray | None = None
    lut: np.ndarray | None = None

    @property
    def bits(self) -> int:
        """Bits on disk, without alignment."""
        per = {"fp16": 16, "int8": 8, "int4": 4, "palette4": 4}[self.scheme]
        extra = sum(a.size * 16 for a in (self.scale, self.lut) if a is not None)
        return self.data.size * per + extra

    def floats(self) -> np.ndarray:
        """The numbers as Core ML decompresses them: float32, rounded to fp16."""
        if self.scheme == "fp16":
            return self.data.astype(np.float32)
        if self.scheme == "palette4":
            rows = self.data.shape[0] // self.lut.shape[0]
            groups = self.data.reshape(self.lut.shape[0], -1)
            values = np.take_along_axis(self.lut.reshape(len(groups), 16), groups, axis=1)
            return (
                values.reshape(-1, rows, self.data.shape[1])
                .reshape(self.data.shape)
                .astype(np.float32)
            )
        blocks = self.data.reshape(*self.scale.shape, -1).astype(np.float32)
        whole = blocks * self.scale.astype(np.float32)[..., None]
        return whole.reshape(self.data.shape).astype(np.float16).astype(np.float32)


def pack(array: np.ndarray, scheme: str) -> QuantizedRows:
    """A float32 array rounded to a scheme; only fp16 takes other arrays than matrices."""
    if scheme == "fp16":
        return QuantizedRows("fp16", array.astype(np.float16))
    pieces = [_pack(piece, scheme) for piece in _pieces(array, scheme)]
    joined = [
        np.concatenate([getattr(p, name) for p in pieces])
        if getattr(pieces[0], name) is not None
        else None
        for name in ("data", "scale", "lut")
    ]
    return QuantizedRows(scheme, *joined)


def _pieces(array: np.ndarray, scheme: str) -> list[np.ndarray]:
    rows = max(1, ROWS_AT_ONCE // array.shape[1])
    if scheme == "palette4":
        rows = max(1, rows // PALETTE_ROWS) * PALETTE_ROWS
    return [array[i : i + rows] for i in range(0, len(array), rows)]


def _pack(array: np.ndarray, scheme: str) -> QuantizedRows:
    if scheme == "int8":
        return _int8(array)
    if scheme == "int4":
        return _int4(array)
    return _palette(array)


def _int8(array: np.ndarray) -> QuantizedRows:
    scale = _safe(np.abs(array).max(axis=1, keepdims=True) / 127)
    codes = np.clip(np.rint(array / scale.astype(np.float32)), -127, 127)
    return QuantizedRows("int8", codes.astype(np.int8), scale)


def _safe(scale: np.ndarray) -> np.ndarray:
    """Scales in fp16, none of them zero."""
    return np.maximum(scale, TINY).astype(np.float16)


def _int4(array: np.ndarray) -> QuantizedRows:
    """The scale, of a few that are tried for each block, that leaves the least square error.

    The number of largest size becomes -8, whichever sign it has: scales may be negative.
    """
    blocks = array.reshape(-1, BLOCK)
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    extreme = np.where(-low > high, low, high)[:, None]
    best = codes = scale = None
    for factor in INT4_FACTORS:
        trial = extreme * np.float32(factor / -8)
        trial = np.where(np.abs(trial) < TINY, TINY, trial).astype(np.float16)
        wide = trial.astype(np.float32)
        found = blocks * (1 / wide)
        np.rint(found, out=found)
        np.clip(found, -8, 7, out=found)
        wrong = found * wide
        wrong -= blocks
        error = np.einsum("ij,ij->i", wrong, wrong)[:, None]
        if best is None:
            best, codes, scale = error, found, trial
            continue
        better = error < best
        best = np.where(better, error, best)
        scale = np.where(better, trial, scale)
        np.copyto(codes, found, where=better)
    shape = (array.shape[0], array.shape[1] // BLOCK)
    return QuantizedRows("int4", codes.astype(np.int8).reshape(array.shape), scale.reshape(shape))


def _palette(array: np.ndarray) -> QuantizedRows:
    """Sixteen values for each group of rows by Lloyd's iteration from evenly spread quantiles."""
    groups = array.reshape(-1, PALETTE_ROWS * array.shape[1])
    ordered = np.sort(groups, axis=1)
    at = ((np.arange(16) + 0.5) / 16 * groups.shape[1]).astype(np.int64)
    lut = ordered[:, at]
    totals = np.concatenate(
        [np.zeros((len(groups), 1)), np.cumsum(ordered, axis=1, dtype=np.float64)], axis=1
    )
    for _ in range(12):  # on the sorted numbers a value's share is a range, so a step is cheap
        middle = (lut[:, 1:] + lut[:, :-1]) / 2
        for g in range(len(groups)):
            edges = np.searchsorted(ordered[g], middle[g])
            edges = np.concatenate([[0], edges, [groups.shape[1]]])
            count = np.diff(edges)
            mean = np.diff(totals[g][edges]) / np.maximum(count, 1)
            lut[g] = np.where(count > 0, mean, lut[g])
    lut = np.sort(lut.astype(np.float16), axis=1)
    wide = lut.astype(np.float32)
    middle = (wide[:, 1:] + wide[:, :-1]) / 2
    indices = np.empty(groups.shape, np.uint8)
    for g in range(len(groups)):
        indices[g] = np.searchsorted(middle[g], groups[g])
    return QuantizedRows("palette4", indices.reshape(array.shape), None, lut.reshape(-1, 1, 16, 1))

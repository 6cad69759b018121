"""Quantised GGUF rows in MLX's forms: packed codes with scales and, mostly, biases of 32 weights.

The tensor types that can be read are those that the installed gguf package decodes. Types whose
weights are scale times code plus offset over 32 weights keep their codes: the value is the file's
to the bit where scale and offset keep theirs. In float16 they do for Q4_0, Q4_1, Q5_0, Q5_1, Q8_0,
TQ1_0 and TQ2_0; Q4_K and Q5_K multiply a float16 by a number of six bits, which float32 holds and
float16 rounds (relative error 2^-11 at most). bfloat16 rounds the scales of all types (2^-8). MXFP4
is a mode of MLX, too, and is kept as it is. Every other type is decoded and quantised anew by
``mx.quantize``.

Quantised anew, a type gets the first width that MLX has from its bits per weight on (scales
included), from 3 up, since 2 bits cannot hold both ends of a symmetric group. What that adds,
relative to the weights' root mean square, and what the type itself had lost (SmolLM2's embedding,
put into these types by rounding each group between its ends):

    Q2_K  3 bits: 18 % to  35 %, together 40 %    (2 bits: 39 %, together 52 %)
    Q3_K  4 bits:  8 % to  17 %, together 19 %    (3 bits: 14 %, together 22 %)
    Q6_K  8 bits: 0.5 % to 2.2 %, together 2.2 %  (6 bits: 2.1 %, together 3.0 %)
    Q4_K  4 bits: 8.5 % to 8.7 %, together 12.2 %: why its codes are kept

Groups of 64 instead of 32 add a fifth more error to each and save half a bit per weight; with 32
everywhere, the tensors of a file differ in bits only, and no row is too short, as every GGUF block
is a multiple of 32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import Q4_K, dequantize

from mlx_flash.models.dtypes import FLOAT_NAMES

GROUP = 32
WIDTHS_ANEW = (3, 4, 5, 6, 8)

_ONE = b"\x00\x3c"  # float16
_NOUGHT = b"\x00\x00"
_K_ONES = b"\x01" * 4 + b"\x00" * 4 + b"\x01" * 4  # eight scales of 1, eight offsets of 0


class _Codes(NamedTuple):
    """Where a block has its scales: ``unit`` there makes every scale 1 and every offset 0."""

    bits: int
    zero: int  # added to the signed codes of a block without offset
    unit: bytes
    at: int = 0


_KEPT = {
    "Q4_0": _Codes(4, 8, _ONE),
    "Q4_1": _Codes(4, 0, _ONE + _NOUGHT),
    "Q5_0": _Codes(5, 16, _ONE),
    "Q5_1": _Codes(5, 0, _ONE + _NOUGHT),
    "Q8_0": _Codes(8, 128, _ONE),
    "Q4_K": _Codes(4, 0, _ONE + _NOUGHT + _K_ONES),
    "Q5_K": _Codes(5, 0, _ONE + _NOUGHT + _K_ONES),
    "TQ1_0": _Codes(2, 1, _ONE, at=52),
    "TQ2_0": _Codes(2, 1, _ONE, at=64),
}


class SourceScheme(NamedTuple):
    """How MLX holds the tensors of one quantised GGUF type.

    Args:
        bits: of a number.
        requantised: MLX has no such type, so the numbers are decoded and quantised anew.
        group: numbers that share a scale and a bias.
        mode: MLX's; "mxfp4" has no biases, and scales of one byte.
    """

    bits: int
    requantised: bool
    group: int = GROUP
    mode: str = "affine"

    def to_config(self) -> dict[str, Any]:
        """The scheme as ``config["quantization"]`` writes it."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


@cache
def is_readable(kind: int) -> bool:
    """Whether the installed gguf package decodes that type; asked by decoding one block."""
    try:
        known = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def readable_types() -> list[str]:
    return [kind.name for kind in GGMLQuantizationType if is_readable(kind)]


def source_scheme(kind: GGMLQuantizationType) -> SourceScheme | None:
    """The scheme of a type that is readable; None for a float type."""
    if kind.name in FLOAT_NAMES:
        return None
    if kind.name == "MXFP4":
        return SourceScheme(4, requantised=False, mode="mxfp4")
    if codes := _KEPT.get(kind.name):
        return SourceScheme(codes.bits, requantised=False)
    weights, size = GGML_QUANT_SIZES[kind]
    bits = next(b for b in WIDTHS_ANEW if b * weights >= 8 * size)
    return SourceScheme(bits, requantised=True)


def to_parts(raw: np.ndarray, kind: GGMLQuantizationType) -> list[mx.array | np.ndarray]:
    """Rows of a GGUF's bytes in the form of ``source_scheme``: codes, scales and, affine, biases.

    Scales of mxfp4 are bytes, those of affine forms and the biases float32.
    """
    return _mxfp4(raw) if kind.name == "MXFP4" else list(to_affine(raw, kind))


def _mxfp4(raw: np.ndarray) -> list[np.ndarray]:
    """Both GGUF and MLX have a byte of exponent and 32 codes of four bits, in other orders."""
    blocks = raw.reshape(len(raw), -1, 17)
    codes = np.concatenate([blocks[:, :, 1:] & 15, blocks[:, :, 1:] >> 4], axis=2)
    return [pack(codes.reshape(len(raw), -1), 4), np.ascontiguousarray(blocks[:, :, 0])]


def to_affine(
    raw: np.ndarray, kind: GGMLQuantizationType
) -> tuple[mx.array | np.ndarray, mx.array | np.ndarray, mx.array | np.ndarray]:
    """Rows of a GGUF's bytes as packed uint32 codes, float32 scales and float32 biases."""
    scheme = source_scheme(kind)
    if scheme is None:
        raise ValueError(f"{kind.name} is not quantised")
    if scheme.requantised:
        rows = mx.array(dequantize(raw, kind))
        return mx.quantize(rows, group_size=scheme.group, bits=scheme.bits)
    codes, (weights, size) = _KEPT[kind.name], GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, size)
    heads = blocks[:, codes.at : codes.at + len(codes.unit)]
    scales, biases = _scales(heads, codes, weights // GROUP)
    plain = blocks.copy()  # with scales of 1 and offsets of 0, the library decodes to codes
    plain[:, codes.at : codes.at + len(codes.unit)] = np.frombuffer(codes.unit, np.uint8)
    values = dequantize(plain.reshape(raw.shape), kind)
    packed = pack((values + codes.zero).astype(np.uint8), codes.bits)
    return packed, scales.reshape(len(raw), -1), biases.reshape(len(raw), -1)


def _scales(heads: np.ndarray, codes: _Codes, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each group of 32 in each block; exact, as float32 holds all of them."""
    halves = np.ascontiguousarray(heads[:, :4]).view(np.float16).astype(np.float32)
    scale = halves[:, :1]
    if len(codes.unit) > 4:
        factors, offsets = Q4_K.get_scale_min(np.ascontiguousarray(heads[:, 4:]))
        return scale * factors, -(halves[:, 1:] * offsets)
    bias = halves[:, 1:] if len(codes.unit) == 4 else -codes.zero * scale
    return np.repeat(scale, groups, axis=1), np.repeat(bias, groups, axis=1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes below 2^bits as MLX packs them: a stream of bits, the lowest first, in uint32.

    Eight codes make ``bits`` bytes; a row is a whole number of groups of 32 codes.
    """
    eights = codes.reshape(len(codes), -1, 8)
    words = np.zeros(eights.shape[:2], "<u8")
    for i in range(8):
        words |= eights[:, :, i].astype(np.uint64) << np.uint64(i * bits)
    octets = words.view(np.uint8).reshape(*eights.shape)[:, :, :bits]
    return np.ascontiguousarray(octets).reshape(len(codes), -1).view("<u4")

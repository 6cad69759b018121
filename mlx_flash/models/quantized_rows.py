"""Rows of numbers, quantised or not: MLX's quantisation schemes and products with such rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_flash.errors import ModelError

MOST_GROUP = 1 << 20
SUFFIXES = ("scales", "biases")
DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32)}  # mode -> bits, group


@dataclass(frozen=True)
class QuantScheme:
    """One of MLX's quantisations: ``bits`` a number, a scale for every ``group_size`` numbers."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in DEFAULTS:
            raise ModelError(
                f"quantisation mode {self.mode!r}; expected one of {', '.join(DEFAULTS)}"
            )
        try:  # nothing is computed: MLX looks at the arguments first
            if type(self.bits) is not int or type(self.group_size) is not int:
                raise TypeError("expected whole numbers")
            if not (0 < self.bits <= 32 and 0 < self.group_size <= MOST_GROUP):  # MLX divides
                raise ValueError(f"expected 1 to 32 bits, groups of 1 to {MOST_GROUP:,}")
            row = mx.zeros((1, 32 * self.group_size))
            mx.quantize(row, self.group_size, self.bits, mode=self.mode)
        except (ValueError, TypeError, OverflowError) as error:
            raise ModelError(
                f"MLX cannot quantise to {self.bits} bits in groups of {self.group_size} "
                f"({self.mode}): {error}"
            ) from error

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of the tensors that go with the packed one end in."""
        return SUFFIXES if self.mode == "affine" else SUFFIXES[:1]

    def words(self, numbers: int) -> int:
        """32-bit words that a row of ``numbers`` takes.

        Raises:
            ModelError: the row is not a multiple of the group size.
        """
        if numbers % self.group_size:
            raise ModelError(
                f"rows of {numbers} numbers cannot be quantised in groups of {self.group_size}; "
                f"choose a --q-group-size that divides {numbers}, or leave -q out"
            )
        return numbers * self.bits // 32

    def scale_type(self, dtype: str) -> str:
        """Type of the scales in a model whose floats are ``dtype``; safetensors' names."""
        return dtype if self.mode == "affine" else "U8"

    def quantize(self, array: mx.array) -> list[mx.array]:
        """Codes, scales and, if affine, biases of an array, groups along its last axis."""
        found = mx.quantize(array, self.group_size, self.bits, mode=self.mode)
        mx.eval(found)
        return list(found)

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size} ({self.mode})"

    def kwargs(self) -> dict[str, Any]:
        """The scheme as MLX's functions take it."""
        return asdict(self)


@dataclass(frozen=True)
class QuantizedRows:
    """Quantised rows: packed numbers [n, words], scales and, if affine, biases [n, groups]."""

    arrays: tuple[mx.array, ...]
    scheme: QuantScheme

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def matmul(self, x: mx.array, transpose: bool) -> mx.array:
        """``x @ rows.T``, or ``x @ rows`` without ``transpose``."""
        weight, *scales = self.arrays
        if self.scheme.mode == "affine":
            scales = [scale.astype(x.dtype) for scale in scales]
        kwargs = self.scheme.kwargs()
        return mx.quantized_matmul(x, weight, *scales, transpose=transpose, **kwargs)

    def floats(self, dtype: mx.Dtype) -> mx.array:
        """The numbers themselves, [n, width]."""
        weight, *scales = self.arrays
        return mx.dequantize(weight, *scales, **self.scheme.kwargs()).astype(dtype)


Rows = mx.array | QuantizedRows


def rows_of(arrays: Mapping[str, mx.array], part: str, scheme: QuantScheme | None) -> Rows:
    """One part of rows (gate, up, down) out of arrays by part; quantised if there is a scheme."""
    if scheme is None:
        return arrays[part]
    return QuantizedRows((arrays[part], *(arrays[f"{part}.{s}"] for s in scheme.suffixes)), scheme)


def part_names(part: str, scheme: QuantScheme | None) -> list[str]:
    """Names that a part of a row has in a layout: its own, then those of its scales."""
    return [part, *(f"{part}.{s}" for s in scheme.suffixes)] if scheme else [part]


def without(names: Sequence[str], part: str | None) -> list[str]:
    """Names of a layout's parts, leaving out one part and its scales."""
    return [name for name in names if name.split(".")[0] != part]


def scheme_from(entry: Mapping[str, Any]) -> QuantScheme:
    """The scheme that an entry of config.json describes.

    Args:
        entry: bits, group_size and, unless affine, mode.

    Raises:
        ModelError: a key is missing, or MLX has no such scheme.
    """
    try:
        return QuantScheme(entry["bits"], entry["group_size"], entry.get("mode", "affine"))
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the quantisation in config.json is {dict(entry)!r:.200}; expected bits and group_size"
        ) from error


def requested_scheme(bits: int | None, group_size: int | None, mode: str = "affine") -> QuantScheme:
    """The scheme of ``--q-bits``, ``--q-group-size``, ``--q-mode``; None is the mode's default."""
    if mode not in DEFAULTS:
        raise ModelError(f"quantisation mode {mode!r}; expected one of {', '.join(DEFAULTS)}")
    default_bits, default_group = DEFAULTS[mode]
    return QuantScheme(
        default_bits if bits is None else bits,
        default_group if group_size is None else group_size,
        mode,
    )

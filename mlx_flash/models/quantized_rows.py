"""Quantised rows: the schemes of MLX's quantisation, and matmuls with rows that are packed or not.

Knows: bits, groups, modes. Does not know: configs beyond one entry, files, families, mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_flash.errors import ModelError

SUFFIXES = ("scales", "biases")
DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32)}  # mode -> bits, group


@dataclass(frozen=True)
class QuantScheme:
    """One way of packing numbers: ``bits`` each, a scale for every ``group_size`` of them."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in DEFAULTS:
            raise ModelError(
                f"quantisation mode {self.mode!r}; expected one of {', '.join(DEFAULTS)}"
            )
        try:  # nothing is computed: MLX looks at the arguments first
            if type(self.bits) is not int or type(self.group_size) is not int:
                raise TypeError("expected whole numbers")
            if self.bits < 1 or self.group_size < 1:  # MLX divides by them
                raise ValueError("expected numbers from 1 on")
            row = mx.zeros((1, 32 * self.group_size))
            mx.quantize(row, self.group_size, self.bits, mode=self.mode)
        except (ValueError, TypeError, OverflowError) as error:
            raise ModelError(
                f"MLX cannot quantise to {self.bits} bits in groups of {self.group_size} "
                f"({self.mode}): {error}"
            ) from error

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names of the tensors that go with the packed one."""
        return SUFFIXES if self.mode == "affine" else SUFFIXES[:1]

    def words(self, numbers: int) -> int:
        """How many 32-bit words so many numbers take.

        Raises:
            ModelError: they are no whole groups.
        """
        if numbers % self.group_size:
            raise ModelError(
                f"{numbers} numbers are no whole groups of {self.group_size}; choose a smaller "
                "--q-group-size, or leave -q out"
            )
        return numbers * self.bits // 32

    def scale_type(self, dtype: str) -> str:
        """Safetensors name of the scales' type where floats are of ``dtype``."""
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
    """One part of rows, packed if there is a scheme, out of arrays by the names of parts."""
    if scheme is None:
        return arrays[part]
    return QuantizedRows((arrays[part], *(arrays[f"{part}.{s}"] for s in scheme.suffixes)), scheme)


def part_names(part: str, scheme: QuantScheme | None) -> list[str]:
    """What a part of a row is called in a row's layout, with its scales."""
    return [part, *(f"{part}.{s}" for s in scheme.suffixes)] if scheme else [part]


def without(names: Sequence[str], part: str | None) -> list[str]:
    """Names of a layout's parts but for one of them and its scales."""
    return [name for name in names if name.split(".")[0] != part]


def scheme(entry: Mapping[str, Any]) -> QuantScheme:
    """A scheme from an entry of a config.

    Raises:
        ModelError: MLX has no such scheme.
    """
    try:
        return QuantScheme(entry["bits"], entry["group_size"], entry.get("mode", "affine"))
    except (KeyError, TypeError) as error:
        raise ModelError(f"a quantisation that makes no sense: {dict(entry)!r:.200}") from error


def request(bits: int | None, group_size: int | None, mode: str = "affine") -> QuantScheme:
    """The scheme asked for, with the mode's defaults."""
    if mode not in DEFAULTS:
        raise ModelError(f"quantisation mode {mode!r}; expected one of {', '.join(DEFAULTS)}")
    default_bits, default_group = DEFAULTS[mode]
    return QuantScheme(
        default_bits if bits is None else bits,
        default_group if group_size is None else group_size,
        mode,
    )

"""Tensors on their way into MIL programs: read once, packed once, shared between functions.

Knows: recipes, ``constexpr_*`` operations, how functions share a weight. Does not know: what a
tensor is for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from coreml_export.errors import ExportError
from coreml_export.quantization.formats import QuantizedRows, pack
from coreml_export.quantization.recipes import Recipe, scheme_of
from coreml_export.source.decoder_spec import Decoder, Tensor, column_slices, tensors
from coreml_export.source.weights_source import Source

from .coremltools_compat import mb, np_int4_dtype, np_uint4_dtype

LARGEST = 65504.0  # of fp16


class Known(Protocol):
    """Tensors whose stored form is known: ``calibration.Codes``, or what a package holds."""

    def packed(self, tensor: Tensor) -> Any:
        """Something with ``floats()``; None where nothing is known."""


class Weights:
    """The tensors of one package.

    Args:
        source: where they are read.
        recipe: what they are stored as.
        progress: called with the bytes of each tensor read, as float32.
        codes: tensors whose codes are known already.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        progress: Callable[[int], Any] | None = None,
        codes: Known | None = None,
    ) -> None:
        self.source, self.recipe, self.progress, self.codes = source, recipe, progress, codes
        self._packed: dict[str, QuantizedRows] = {}

    def packed(self, tensor: Tensor) -> QuantizedRows:
        """A tensor as it is stored."""
        if tensor.key not in self._packed:
            array = self.read(tensor)
            found = self.codes.packed(tensor) if self.codes else None
            if found is None:
                found = pack(array, scheme_of(tensor.name, array.shape, self.recipe))
            self._packed[tensor.key] = found
            if self.progress:
                self.progress(array.nbytes)
        return self._packed[tensor.key]

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor as float32.

        Raises:
            ExportError: it has numbers that fp16 cannot hold.
        """
        array = tensor.of(self.source.take(tensor.name))
        most = float(np.abs(array).max(initial=0))
        if not most <= LARGEST:
            raise ExportError(
                f"tensor {tensor.name} has a number of size {most:g}, more than the {LARGEST:g} "
                "that fp16, in which Core ML computes, can hold"
            )
        return array

    def matrix(self, tensor: Tensor) -> Any:
        """A tensor as a variable of the function that is being built."""
        packed, name = self.packed(tensor), safe_name(tensor.key)
        if packed.scheme == "fp16":
            return self.constant(packed.data, tensor.key)
        if packed.scheme == "palette4":
            indices = self.constant(packed.data.view(np_uint4_dtype), f"{tensor.key}/indices")
            lut = self.constant(packed.lut, f"{tensor.key}/lut")
            return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=name)
        kind = np_int4_dtype if packed.scheme == "int4" else np.int8
        data = self.constant(packed.data.view(kind), f"{tensor.key}/codes")
        scale = self.constant(packed.scale, f"{tensor.key}/scale")
        return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=name)

    def vector(self, tensor: Tensor) -> Any:
        """The same for a tensor that is never packed, though a norm's weight may be scaled."""
        if tensor.key not in self._packed:
            known = self.codes.packed(tensor) if self.codes else None
            self._packed[tensor.key] = known or pack(self.read(tensor), "fp16")
        return self.constant(self._packed[tensor.key].data, tensor.key)

    def table(self, key: str, make: Callable[[], np.ndarray]) -> Any:
        """A table that is computed, fp16."""
        if key not in self._packed:
            self._packed[key] = pack(make(), "fp16")
        return self.constant(self._packed[key].data, key)

    def zeros(self, count: int) -> Any:
        """What a linear layer without a bias adds: else coremltools stores zeros for each."""
        return self.table(f"zeros/{count}", lambda: np.zeros(count, np.float32))

    def constant(self, array: np.ndarray, key: str) -> Any:
        """A constant whose bytes are stored once, however many functions use it."""
        var = mb.const(val=array, name=safe_name(key))
        var.op.weight_id = key
        return var


def safe_name(key: str) -> str:
    """What a tensor of this key is called in a program."""
    return re.sub(r"\W", "_", key)


def stored(
    source: Source,
    decoder: Decoder,
    chosen: Recipe,
    wide: bool = True,
    codes: Known | None = None,
) -> dict[str, np.ndarray]:
    """Every tensor as the packages store it, back in float32 and in the source's order.

    Args:
        wide: the head is stored in slices.
        codes: tensors whose codes are known already.
    """
    matrices: dict[str, list[Tensor]] = {}
    for tensor, matrix in tensors(decoder):
        if matrix:
            known = matrices.setdefault(tensor.name, [])
            if tensor.key not in [t.key for t in known]:
                known.append(tensor)
    if wide:
        head = decoder.head.weight
        matrices[head.name] = column_slices(head, source.shapes[head.name][1])
    found = {}
    for name in sorted(source.names):
        array = np.array(source.take(name))
        for tensor in matrices.get(name, [Tensor(name)]):
            piece = tensor.of(array)
            scheme = scheme_of(name, piece.shape, chosen) if name in matrices else "fp16"
            known = codes.packed(tensor) if codes else None
            floats = (known or pack(piece, scheme)).floats()
            rows = slice(None) if tensor.rows is None else tensor.rows
            columns = slice(*tensor.columns) if tensor.columns else None
            if columns is None:
                array[rows] = floats
            else:
                array[rows, columns] = floats
        found[name] = array
    return found

"""A model's tensors as an export stores them, wherever their stored form comes from.

Three sources have one interface: numbers rounded to the nearest (here), codes found on text
(``calibrate``), and what the packages of a finished export hold (``verification``).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from coreml_export.errors import ExportError
from coreml_export.source.decoder_spec import Decoder, Tensor, column_slices, tensors
from coreml_export.source.weights_source import Source

from .formats import QuantizedRows, pack
from .recipes import Recipe, scheme_of

LARGEST = 65504.0  # of fp16


class StoredWeights(Protocol):
    """Tensors in the form in which they are stored."""

    def packed(self, tensor: Tensor) -> QuantizedRows:
        """One tensor, or the rows or columns of one that ``tensor`` selects.

        Raises:
            ExportError: it has numbers that fp16 cannot hold.
        """


class RoundedWeights:
    """Every tensor rounded to the nearest numbers that its scheme has.

    Args:
        source: where tensors are read, anew each time.
        decoder: says which of them are matrices; all others are fp16.
        recipe: which scheme a matrix gets.
    """

    def __init__(self, source: Source, decoder: Decoder, recipe: Recipe) -> None:
        self._source, self._recipe = source, recipe
        self._matrices = {tensor.name for tensor, matrix in tensors(decoder) if matrix}

    def packed(self, tensor: Tensor) -> QuantizedRows:
        """See ``StoredWeights``."""
        array = read(self._source, tensor)
        matrix = tensor.name in self._matrices
        return pack(array, scheme_of(tensor.name, array.shape, self._recipe) if matrix else "fp16")


def read(source: Source, tensor: Tensor) -> np.ndarray:
    """What a tensor selects, as float32.

    Raises:
        ExportError: it has numbers that fp16 cannot hold.
    """
    array = tensor.of(source.take(tensor.name))
    most = float(np.abs(array).max(initial=0))
    if not most <= LARGEST:
        raise ExportError(
            f"tensor {tensor.name} has a number of size {most:g}, more than the {LARGEST:g} "
            "that fp16, in which Core ML computes, can hold"
        )
    return array


def dequantised(
    source: Source, decoder: Decoder, stored: StoredWeights, fp32_residual: bool
) -> dict[str, np.ndarray]:
    """Every tensor as it is stored, back in float32, under the source's names and in its order.

    Args:
        fp32_residual: the head is stored in slices.
    """
    pieces: dict[str, dict[str, Tensor]] = {}
    for tensor, _ in tensors(decoder):
        pieces.setdefault(tensor.name, {})[tensor.key] = tensor
    if fp32_residual:
        head = decoder.head.weight
        slices = column_slices(head, source.shapes[head.name][1])
        pieces[head.name] = {piece.key: piece for piece in slices}
    found = {}
    for name in sorted(source.names):
        if name not in pieces:  # no program takes it
            found[name] = pack(source.take(name), "fp16").floats()
            continue
        array = np.full(source.shapes[name], np.nan, np.float32)  # the pieces fill all of it
        for piece in pieces[name].values():
            rows = slice(None) if piece.rows is None else piece.rows
            columns = (slice(*piece.columns),) if piece.columns else ()
            array[(rows, *columns)] = stored.packed(piece).floats()
        found[name] = array
    return found

"""Tensors on their way into MIL programs: fetched once for a package, shared by its functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from coreml_export.quantization.formats import QuantizedRows, pack
from coreml_export.quantization.stored_weights import StoredWeights
from coreml_export.source.decoder_spec import Tensor

from .coremltools_compat import mb, np_int4_dtype, np_uint4_dtype


class Weights:
    """The tensors of one package.

    Args:
        stored: where they come from.
        progress: called with the bytes that each tensor has as float32.
    """

    def __init__(self, stored: StoredWeights, progress: Callable[[int], Any] | None = None) -> None:
        self._stored, self._progress = stored, progress
        self._packed: dict[str, QuantizedRows] = {}

    def packed(self, tensor: Tensor) -> QuantizedRows:
        """A tensor as it is stored.

        Raises:
            ExportError: it has numbers that fp16 cannot hold.
        """
        if tensor.key not in self._packed:
            found = self._packed[tensor.key] = self._stored.packed(tensor)
            if self._progress:
                self._progress(4 * found.data.size)
        return self._packed[tensor.key]

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
        """The same for a bias or a norm's weight, which are always fp16."""
        return self.constant(self.packed(tensor).data, tensor.key)

    def table(self, key: str, make: Callable[[], np.ndarray]) -> Any:
        """A table that ``make`` computes, fp16."""
        if key not in self._packed:
            self._packed[key] = pack(make(), "fp16")
        return self.constant(self._packed[key].data, key)

    def zeros(self, count: int) -> Any:
        """The bias of layers that have none, shared: coremltools would store one for each."""
        return self.table(f"zeros/{count}", lambda: np.zeros(count, np.float32))

    def constant(self, array: np.ndarray, key: str) -> Any:
        """A constant whose bytes are stored once, however many functions use it."""
        var = mb.const(val=array, name=safe_name(key))
        var.op.weight_id = key
        return var


def safe_name(key: str) -> str:
    """The name of a tensor with this key in a program."""
    return re.sub(r"\W", "_", key)

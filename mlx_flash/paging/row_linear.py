"""FFN modules that compute from rows in slots instead of weights of their own.

``RowLinear`` stands where an ``nn.Linear`` stood in mlx-lm's own FFN module, so activations, norms
and odd forms stay mlx-lm's; only where the matrix lies has changed. Gate and up use rows as they
are; down uses them transposed, ``h @ rows``.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.models.families import Ffn, projections
from mlx_flash.models.quantized_rows import QuantizedRows, QuantScheme, Rows, rows_of

from .slots.slot_memory import SlotMemory


class RowLinear(nn.Module):
    """A linear layer over rows that are bound to it before each call.

    Args:
        linear: the layer it replaces; its bias stays, its weight is dropped.
        transposed: False for gate and up (weight [rows, d_model]), True for down, where the rows
            are the columns of the weight [d_model, rows].
        parts: how many parts of a row it computes: 2 for a fused gate and up.
    """

    def __init__(self, linear: nn.Linear, transposed: bool, parts: int = 1) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.d_model = outputs if transposed else inputs
        self.transposed = transposed
        self.parts = parts
        if "bias" in linear:
            self.bias = linear.bias
        self._rows: list[Rows] = []
        self._index: mx.array | None = None
        self._values: mx.array | None = None
        self._partial = False

    def bind(
        self,
        *rows: Rows,
        index: mx.array | None = None,
        values: mx.array | None = None,
        partial: bool = False,
    ) -> None:
        """Compute from ``rows`` [n, width], one for each part; no columns from d_model on are used.

        Args:
            index: int array [n], which rows of the layer they are; None for all of them in order.
            values: [..., n], the output for the first part, known already; it has no rows then.
            partial: give what these rows add to the output, float32, without the bias (down only).
        """
        self._rows, self._index, self._values = list(rows), index, values
        self._partial = partial

    def __call__(self, x: mx.array) -> mx.array:
        if not self._rows and self._values is None:
            raise ValueError("no rows are bound to this layer")
        if self.transposed:
            return self._down(x, self._rows[0])
        known = [] if self._values is None else [self._values]
        part = len(known)
        found = [self._forward(x, rows, part + i) for i, rows in enumerate(self._rows)]
        found = known + found
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)

    def _forward(self, x: mx.array, rows: Rows, part: int) -> mx.array:
        if isinstance(rows, QuantizedRows):
            y = rows.matmul(x, transpose=True)
            return y + self._bias(part) if "bias" in self else y
        if padding := rows.shape[-1] - self.d_model:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        if "bias" not in self:
            return x @ rows.T
        return mx.addmm(self._bias(part), x, rows.T)

    def _bias(self, part: int) -> mx.array:
        if self._index is None:
            return self.bias
        return mx.split(self.bias, self.parts)[part][self._index]

    def _down(self, x: mx.array, rows: Rows) -> mx.array:
        if isinstance(rows, QuantizedRows):
            y = rows.matmul(x.astype(mx.float32) if self._partial else x, transpose=False)
            return y + self.bias if "bias" in self and not self._partial else y
        if self._partial:
            y = x.astype(mx.float32) @ rows.astype(mx.float32)
            return y[..., : self.d_model]
        if "bias" not in self:
            return (x @ rows)[..., : self.d_model]
        padding = rows.shape[-1] - self.d_model
        bias = mx.pad(self.bias, [(0, padding)]) if padding else self.bias
        if x.dtype == mx.float32:
            # addmm begins its sum at the bias for this orientation, after it for the dense one.
            return (x @ rows + bias)[..., : self.d_model]
        return mx.addmm(bias, x, rows)[..., : self.d_model]


def use_rows(mlp: nn.Module, ffn: Ffn) -> None:
    """Replace the projections of an FFN module by ``RowLinear``; their weights are dropped."""
    for part, name in projections(ffn).items():
        if not isinstance(mlp[name], RowLinear):  # a fused one is gate and up
            parts = 2 if name == ffn.fused else 1
            mlp[name] = RowLinear(mlp[name], transposed=part == "down", parts=parts)


def bind(mlp: nn.Module, ffn: Ffn, memory: SlotMemory, scheme: QuantScheme | None = None) -> None:
    """Let a module made by ``use_rows`` compute from all rows in ``memory``."""
    for part, name in projections(ffn).items():
        fused = name == ffn.fused
        rows = memory.joined("gate", "up") if fused else rows_of(memory.arrays, part, scheme)
        mlp[name].bind(rows)


def bind_some(
    mlp: nn.Module,
    ffn: Ffn,
    arrays: dict[str, Rows],
    index: mx.array,
    known: tuple[str, mx.array] | None,
    partial: bool = False,
) -> None:
    """Let a module made by ``use_rows`` compute from some rows.

    Args:
        arrays: part -> [n, width], packed or not.
        index: which rows they are, int32 [n].
        known: a part whose output is there already, and that output for every row [..., rows].
        partial: see ``RowLinear.bind``.
    """
    values = mx.take(known[1], index, axis=-1) if known else None
    part = known[0] if known else None
    if ffn.fused:
        rows = [arrays[name] for name in ("gate", "up") if name != part]
        mlp[ffn.fused].bind(*rows, index=index, values=values)
        mlp[ffn.down].bind(arrays["down"], partial=partial)
        return
    for name, projection in projections(ffn).items():
        if name == part:
            mlp[projection].bind(index=index, values=values)
        else:
            mlp[projection].bind(arrays[name], index=index, partial=partial and name == "down")


class PackedRows(nn.Module):
    """A down projection from packed rows: columns of its weight, packed along d_model.

    Args:
        linear: the layer it replaces; its bias stays.
        scheme: how rows are packed.
    """

    def __init__(self, linear: nn.Linear, scheme: QuantScheme) -> None:
        super().__init__()
        d_model, rows = linear.weight.shape
        found = mx.quantize(
            mx.zeros((rows, d_model)), scheme.group_size, scheme.bits, mode=scheme.mode
        )
        for name, array in zip(("weight", *scheme.suffixes), found, strict=True):
            self[name] = array
        if "bias" in linear:
            self.bias = linear.bias
        self._scheme = scheme
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        arrays = tuple(self[name] for name in ("weight", *self._scheme.suffixes))
        y = QuantizedRows(arrays, self._scheme).matmul(x, transpose=False)
        return y + self.bias if "bias" in self else y

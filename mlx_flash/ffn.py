"""FFN modules that compute from rows in slots instead of weights of their own.

``RowLinear`` stands where an ``nn.Linear`` stood in mlx-lm's own FFN module, so activations, norms
and odd forms stay mlx-lm's; only where the matrix lies has changed. Gate and up use rows as they
are; down uses them transposed, ``h @ rows``.

Knows: one layer's FFN, where its rows will be. Does not know: files, budgets, model families
beyond the names of projections given to it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .families import Ffn, projections, weight_shapes
from .packed import Packed, Rows, Scheme, part_names, rows_of
from .reader import RowReader
from .rows import RowFile
from .slots import DTYPES, UNITS, SlotMemory
from .stream import LayerStream

CHUNK_BYTES = 4 << 20


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
        if isinstance(rows, Packed):
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
        if isinstance(rows, Packed):
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


def bind(mlp: nn.Module, ffn: Ffn, memory: SlotMemory, scheme: Scheme | None = None) -> None:
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


def resident_part(reader: RowReader, layer: int, part: str, scheme: Scheme | None = None) -> Rows:
    """One part of every row of a layer, [rows, d_model], read from the row file."""
    layout, rows = reader.file.layout, reader.file.layers[layer].rows
    names = part_names(part, scheme)
    parts = [p for p in layout.parts if p.name in names]
    arrays = {p.name: mx.zeros((rows, p.width), UNITS[DTYPES[p.dtype].size]) for p in parts}
    mx.eval(list(arrays.values()))
    chunk = SlotMemory(layout, min(rows, max(1, CHUNK_BYTES // layout.stride)), parts=names)
    held = [view for view in chunk.views if view is not None]
    views = [np.array(arrays[p.name], copy=False) for p in parts]
    for start in range(0, rows, chunk.capacity):
        count = min(chunk.capacity, rows - start)
        reader.read(layer, np.arange(start, start + count), np.arange(count), chunk.views)
        for p, source, target in zip(parts, held, views, strict=True):
            target[start : start + count] = source[:count, : p.nbytes].view(target.dtype)
    typed = {p.name: arrays[p.name].view(DTYPES[p.dtype]) for p in parts}
    mx.eval(list(typed.values()))
    return rows_of(typed, part, scheme)


def dense_weights(reader: RowReader, layer: int, ffn: Ffn) -> dict[str, mx.array]:
    """A layer's projection weights as ``nn.Linear`` holds them, read from the row file.

    Returns:
        Projection name to array: gate and up [rows, d_model], fused [2 * rows, d_model],
        down [d_model, rows].
    """
    rows, layout = reader.file.layers[layer].rows, reader.file.layout
    parts = layout.parts
    dtype = DTYPES[parts[0].dtype]
    chunk = SlotMemory(layout, min(rows, max(1, CHUNK_BYTES // layout.stride)))
    shapes = weight_shapes(ffn, rows, parts[0].width)
    weights = {name: mx.zeros(shape, UNITS[dtype.size]) for name, shape in shapes.items()}
    mx.eval(weights)
    views = {part: np.array(weights[name], copy=False) for part, name in projections(ffn).items()}
    views["down"] = views["down"].T
    if ffn.fused:
        views["gate"], views["up"] = views["gate"][:rows], views["up"][rows:]
    for start in range(0, rows, chunk.capacity):
        count = min(chunk.capacity, rows - start)
        reader.read(layer, np.arange(start, start + count), np.arange(count), chunk.views)
        for part, view in zip(parts, chunk.views, strict=True):
            target = views[part.name]
            target[start : start + count] = view[:count, : part.nbytes].view(target.dtype)
    weights = {name: weight.view(dtype) for name, weight in weights.items()}
    mx.eval(weights)
    return weights


def placeholders(file: RowFile, layer: int, ffn: Ffn) -> dict[str, mx.array]:
    """Arrays of the names and shapes of ``dense_weights``, never to be evaluated."""
    part = file.layout.parts[0]
    shapes = weight_shapes(ffn, file.layers[layer].rows, part.width)
    return {name: mx.zeros(shape, DTYPES[part.dtype]) for name, shape in shapes.items()}


class PackedRows(nn.Module):
    """A down projection from packed rows: columns of its weight, packed along d_model.

    Args:
        linear: the layer it replaces; its bias stays.
        scheme: how rows are packed.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
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
        y = Packed(arrays, self._scheme).matmul(x, transpose=False)
        return y + self.bias if "bias" in self else y


class FlashMLP(nn.Module):
    """mlx-lm's FFN of one layer, its rows streamed from flash for every call.

    Args:
        mlp: mlx-lm's module after ``use_rows``.
        ffn: where its projections are.
        layer: number of the layer in the row file.
        stream: hands out the layer's rows.
        scheme: how rows are packed; None for floats.
    """

    def __init__(
        self,
        mlp: nn.Module,
        ffn: Ffn,
        layer: int,
        stream: LayerStream,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer = layer
        self._ffn = ffn
        self._stream = stream
        self._scheme = scheme

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        memory = self._stream.acquire(self.layer, x)
        bind(self.mlp, self._ffn, memory, self._scheme)
        y = self.mlp(x, *args, **kwargs)
        self._stream.done(y)
        return y

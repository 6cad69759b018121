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

from .cache import DTYPES, UNITS, SlotMemory
from .families import Ffn, projections, weight_shapes
from .reader import RowReader
from .rows import RowFile
from .stream import LayerStream

CHUNK_BYTES = 4 << 20


class RowLinear(nn.Module):
    """A linear layer over rows that are bound to it before each call.

    Args:
        linear: the layer it replaces; its bias stays, its weight is dropped.
        transposed: False for gate and up (weight [rows, d_model]), True for down, where the rows
            are the columns of the weight [d_model, rows].
    """

    def __init__(self, linear: nn.Linear, transposed: bool) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.d_model = outputs if transposed else inputs
        self.transposed = transposed
        if "bias" in linear:
            self.bias = linear.bias
        self._rows: mx.array | None = None

    def bind(self, rows: mx.array) -> None:
        """Compute from ``rows`` [n, width]; columns from d_model on are not used."""
        self._rows = rows

    def __call__(self, x: mx.array) -> mx.array:
        rows = self._rows
        if rows is None:
            raise ValueError("no rows are bound to this layer")
        padding = rows.shape[-1] - self.d_model
        if not self.transposed:
            if padding:
                x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
            return self._affine(x, rows.T, 0)
        return self._affine(x, rows, padding)[..., : self.d_model]

    def _affine(self, x: mx.array, weight: mx.array, padding: int) -> mx.array:
        if "bias" not in self:
            return x @ weight
        bias = mx.pad(self.bias, [(0, padding)]) if padding else self.bias
        if self.transposed and x.dtype == mx.float32:
            # addmm begins its sum at the bias for this orientation, after it for the dense one.
            return x @ weight + bias
        return mx.addmm(bias, x, weight)


def use_rows(mlp: nn.Module, ffn: Ffn) -> None:
    """Replace the projections of an FFN module by ``RowLinear``; their weights are dropped."""
    for part, name in projections(ffn).items():
        if not isinstance(mlp[name], RowLinear):  # a fused one is gate and up
            mlp[name] = RowLinear(mlp[name], transposed=part == "down")


def bind(mlp: nn.Module, ffn: Ffn, memory: SlotMemory) -> None:
    """Let a module made by ``use_rows`` compute from all rows in ``memory``."""
    for part, name in projections(ffn).items():
        fused = name == ffn.fused
        mlp[name].bind(memory.joined("gate", "up") if fused else memory.arrays[part])


def dense_weights(reader: RowReader, layer: int, ffn: Ffn) -> dict[str, mx.array]:
    """A layer's projection weights as ``nn.Linear`` holds them, read from the row file.

    Returns:
        Projection name to array: gate and up [rows, d_model], fused [2 * rows, d_model],
        down [d_model, rows].
    """
    rows, parts = reader.file.layers[layer].rows, reader.layout.parts
    dtype = DTYPES[parts[0].dtype]
    chunk = SlotMemory(reader.layout, min(rows, max(1, CHUNK_BYTES // reader.layout.stride)))
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


class FlashMLP(nn.Module):
    """mlx-lm's FFN of one layer, its rows streamed from flash for every call.

    Args:
        mlp: mlx-lm's module after ``use_rows``.
        ffn: where its projections are.
        layer: number of the layer in the row file.
        stream: hands out the layer's rows.
    """

    def __init__(self, mlp: nn.Module, ffn: Ffn, layer: int, stream: LayerStream) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer = layer
        self._ffn = ffn
        self._stream = stream

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        memory = self._stream.acquire(self.layer, x)
        bind(self.mlp, self._ffn, memory)
        y = self.mlp(x, *args, **kwargs)
        self._stream.done(y)
        return y

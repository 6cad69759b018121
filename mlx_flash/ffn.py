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
from .families import Ffn
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
    for name in (ffn.fused, None if ffn.fused else ffn.gate, None if ffn.fused else ffn.up):
        if name:
            mlp[name] = RowLinear(mlp[name], transposed=False)
    mlp[ffn.down] = RowLinear(mlp[ffn.down], transposed=True)


def bind(mlp: nn.Module, ffn: Ffn, memory: SlotMemory) -> None:
    """Let a module made by ``use_rows`` compute from all rows in ``memory``."""
    if ffn.fused:
        mlp[ffn.fused].bind(memory.joined("gate", "up"))
    else:
        if ffn.gate:
            mlp[ffn.gate].bind(memory.arrays["gate"])
        mlp[ffn.up].bind(memory.arrays["up"])
    mlp[ffn.down].bind(memory.arrays["down"])


def dense_weights(reader: RowReader, layer: int, ffn: Ffn) -> dict[str, mx.array]:
    """A layer's projection weights as ``nn.Linear`` holds them, read from the row file.

    Returns:
        Projection name to array: gate and up [rows, d_model], fused [2 * rows, d_model],
        down [d_model, rows].
    """
    rows, parts = reader.file.layers[layer].rows, reader.layout.parts
    d_model, dtype = parts[0].width, DTYPES[parts[0].dtype]
    chunk = SlotMemory(reader.layout, min(rows, max(1, CHUNK_BYTES // reader.layout.stride)))
    raw = {2: np.uint16, 4: np.uint32}[dtype.size]
    arrays = {name: mx.zeros((rows, d_model), UNITS[dtype.size]) for name in ffn.parts[:-1]}
    if ffn.fused:
        both = mx.zeros((2 * rows, d_model), UNITS[dtype.size])
        mx.eval(both)
        arrays = {"gate": both[:rows], "up": both[rows:]}
    arrays["down"] = mx.zeros((d_model, rows), UNITS[dtype.size])
    mx.eval(arrays)
    views = {name: np.array(array, copy=False) for name, array in arrays.items()}
    for start in range(0, rows, chunk.capacity):
        count = min(chunk.capacity, rows - start)
        reader.read(layer, np.arange(start, start + count), np.arange(count), chunk.views)
        for part, view in zip(parts, chunk.views, strict=True):
            got = view[:count, : part.nbytes].view(raw)
            if part.name == "down":
                views["down"][:, start : start + count] = got.T
            else:
                views[part.name][start : start + count] = got
    if ffn.fused:
        named = {ffn.fused: both, ffn.down: arrays["down"]}
    else:
        place = {"gate": ffn.gate, "up": ffn.up, "down": ffn.down}
        named = {place[name]: array for name, array in arrays.items()}
    named = {name: array.view(dtype) for name, array in named.items()}
    mx.eval(named)
    return named


def placeholders(file: RowFile, layer: int, ffn: Ffn) -> dict[str, mx.array]:
    """Arrays of the names and shapes of ``dense_weights``, never to be evaluated."""
    rows, d_model = file.layers[layer].rows, file.layout.parts[0].width
    dtype = DTYPES[file.layout.parts[0].dtype]
    shapes = {ffn.fused: (2 * rows, d_model)} if ffn.fused else {ffn.up: (rows, d_model)}
    if ffn.gate:
        shapes[ffn.gate] = (rows, d_model)
    shapes[ffn.down] = (d_model, rows)
    return {name: mx.zeros(shape, dtype) for name, shape in shapes.items()}


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

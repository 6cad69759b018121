"""Weights of FFN modules read from the row file."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.models.dtypes import BIT_VIEWS, DTYPES
from mlx_flash.models.families import Ffn, projections, weight_shapes
from mlx_flash.models.quantized_rows import QuantScheme, Rows, part_names, rows_of
from mlx_flash.predictors.predictor import Projection
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_file import RowFile

from .slots.slot_memory import SlotMemory


def bind_arrays(module: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Assign arrays to a module's parameters by dotted path, without checks."""
    for name, array in arrays.items():
        *path, last = name.split(".")
        target = module
        for step in path:
            target = target[step]
        target[last] = array


CHUNK_BYTES = 4 << 20


def resident_part(
    reader: RowReader, layer: int, part: str, scheme: QuantScheme | None = None
) -> Rows:
    """One part of every row of a layer, [rows, d_model], read from the row file."""
    layout, rows = reader.file.layout, reader.file.layers[layer].rows
    names = part_names(part, scheme)
    parts = [p for p in layout.parts if p.name in names]
    arrays = {p.name: mx.zeros((rows, p.width), BIT_VIEWS[DTYPES[p.dtype].size]) for p in parts}
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


def resident_projection(
    reader: RowReader, layer: int, part: str, mlp: nn.Module, ffn: Ffn, scheme: QuantScheme | None
) -> Projection:
    """One projection of a layer for a predictor: its weights from the row file, its bias if any.

    Args:
        part: "gate" or "up".
        mlp: the layer's FFN module, its biases loaded.
    """
    module = mlp[projections(ffn)[part]]
    bias = module.bias if "bias" in module else None
    if bias is not None and ffn.fused:
        bias = mx.split(bias, 2)[0]
    return Projection(part, resident_part(reader, layer, part, scheme), bias)


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
    weights = {name: mx.zeros(shape, BIT_VIEWS[dtype.size]) for name, shape in shapes.items()}
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


def whole_layer(reader: RowReader, layer: int) -> SlotMemory:
    """All rows of a layer, read now, each part with its own shape."""
    extent = reader.file.layers[layer]
    memory = SlotMemory(extent.layout, extent.rows, unpadded=True)
    rows = np.arange(extent.rows)
    reader.read(layer, rows, rows, memory.views)
    return memory


def first_row(memory: SlotMemory) -> dict[str, mx.array]:
    """The arrays of a memory of one row, not copied (``array[0]`` would be)."""
    return {name: array.squeeze(0) for name, array in memory.arrays.items()}


def read_layer(file: RowFile, layer: int) -> dict[str, mx.array]:
    """All rows of a layer through the page cache: part -> array [rows, *shape of the part].

    For whoever reads a row file once, such as an exporter; paging keeps a reader open.
    """
    reader = RowReader(file, threads=1, direct=False)
    try:
        return whole_layer(reader, layer).arrays
    finally:
        reader.close()

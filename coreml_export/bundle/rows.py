"""What the paged profile keeps outside of packages: the row file and the embedding's table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coreml_export.program.paged import RowShape, row_layout, row_shape
from coreml_export.program.weights import Weights
from coreml_export.quantization.stored_weights import StoredWeights
from coreml_export.source.decoder_spec import Decoder, embedding_pieces
from mlx_flash.storage.row_layout import PAGE
from mlx_flash.storage.row_writer import RowFileWriter


def write_rows(
    path: Path,
    decoder: Decoder,
    stored: StoredWeights,
    int8: bool,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Write the row file of a decoder, layer by layer.

    Args:
        path: file to make.
        int8: rows as int8 codes with scales instead of float16.
        progress: called with the bytes that each tensor has as float32.

    Returns:
        What the manifest has to say of it.
    """
    shape, layout = row_shape(decoder), row_layout(decoder, int8)
    counts = [decoder.d_ffn] * len(decoder.layers)
    writer = RowFileWriter(path, layout, counts, "coreml_export")
    try:
        for layer in range(len(counts)):
            rows = rows_of_layer(Weights(stored, progress), decoder, layer)
            pieces = as_int8(shape, rows) if int8 else [rows]
            block = np.zeros((len(rows), layout.stride), np.uint8)
            layout.pack([np.ascontiguousarray(p).view(np.uint8) for p in pieces], block)
            writer.write(layer, [block])
    finally:
        writer.close()
    start = path.stat().st_size - sum(counts) * layout.stride
    return {
        "file": path.name,
        "dtype": "int8" if int8 else "float16",
        "extra": shape.extra if int8 else 0,
        "parts": list(shape.parts),
        "biases": list(shape.biases),
        "width": shape.codes if int8 else shape.width,
        "state_width": shape.width,
        "stride": layout.stride,
        "rows": decoder.d_ffn,
        "data_starts_on": PAGE,
        "offsets": [start + i * decoder.d_ffn * layout.stride for i in range(len(counts))],
    }


def write_embedding(
    path: Path, decoder: Decoder, stored: StoredWeights, fp32_residual: bool
) -> dict[str, Any]:
    """Write the token embedding as float16 [vocabulary, width], as the dense packages hold it.

    Args:
        path: file to make.
        fp32_residual: the head is stored in slices, and the embedding with it where it is tied.

    Returns:
        What the manifest has to say of it.
    """
    pieces = embedding_pieces(decoder, fp32_residual)
    floats = [stored.packed(piece).floats().astype(np.float16) for piece in pieces]
    table = np.concatenate(floats, axis=1)
    table.tofile(path)
    return {"file": path.name, "dtype": "float16", "shape": list(table.shape)}


def rows_of_layer(weights: Weights, decoder: Decoder, layer: int) -> np.ndarray:
    """All rows of a layer as they lie in the row file, float16 [rows, width].

    Their numbers are those that the dense packages hold, so that both compute the same model.
    """
    shape = row_shape(decoder)
    part = decoder.layers[layer].ffn
    d = shape.d_model
    rows = np.zeros((decoder.d_ffn, shape.width), np.float16)
    linears = {"gate": part.gate, "up": part.up, "down": part.down}
    for i, name in enumerate(shape.parts):
        array = weights.packed(linears[name].weight).floats()
        rows[:, i * d : (i + 1) * d] = array.T if name == "down" else array
    for i, name in enumerate(shape.biases):
        rows[:, len(shape.parts) * d + i] = weights.packed(linears[name].bias).floats()
    return rows


def as_int8(shape: RowShape, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of float16 in int8.

    Args:
        rows: float16 [n, width].

    Returns:
        (codes int8 [n, codes], scales and biases float16 [n, extra]).
    """
    d, parts = shape.d_model, len(shape.parts)
    numbers = rows[:, : shape.codes].astype(np.float32).reshape(len(rows), parts, d)
    scale = np.maximum(np.abs(numbers).max(axis=2) / 127, 2.0**-20).astype(np.float16)
    codes = np.rint(numbers / scale.astype(np.float32)[..., None]).clip(-127, 127).astype(np.int8)
    extra = np.concatenate([scale, rows[:, shape.codes : shape.codes + len(shape.biases)]], axis=1)
    return codes.reshape(len(rows), shape.codes), extra

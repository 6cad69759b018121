"""The decoder with its FFN rows outside: attention per layer, FFN over given or cached rows, head.

A token takes, for each layer, a call of ``attention_i``, of ``predict_i`` (see ``predictors``) and
of one FFN function, then one of ``head``. FFN functions hold no weights and serve all layers:
``ffn_rows_N`` computes over N rows that the caller hands over; ``ffn_cache_N`` first scatters N new
rows into a state of rows that stays with Core ML, then computes over all of it (a sliding window as
a state). A row is as it lies in the row file: gate, up and down one behind the other, then biases.
For iOS 26 rows may be int8: their scales and biases are then an input of their own, ``extra``, and
the state holds the float16 numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coreml_export.source.decoder_spec import MULTIPLE, Decoder
from mlx_flash.storage.row_layout import RowLayout

from .coremltools_compat import TARGETS, mb, types
from .dense import state
from .layers import Builder, Cache, activate
from .weights import Weights

SMALLEST_BUCKET = 64
NEW_ROWS = (16, 128)  # how many rows one call can scatter into the state


@dataclass(frozen=True)
class RowShape:
    """What a row consists of: parts of d_model numbers, biases, zeros up to a multiple of 32."""

    parts: tuple[str, ...]
    biases: tuple[str, ...]
    d_model: int

    @property
    def width(self) -> int:
        """Numbers in a row."""
        whole = len(self.parts) * self.d_model + len(self.biases)
        return -(-whole // MULTIPLE) * MULTIPLE

    @property
    def codes(self) -> int:
        """Numbers in a row of int8 without its scales and biases."""
        return len(self.parts) * self.d_model

    @property
    def extra(self) -> int:
        """Scales and biases of a row of int8."""
        return len(self.parts) + len(self.biases)


def row_shape(decoder: Decoder) -> RowShape:
    """The shape of a decoder's rows."""
    ffn = decoder.layers[0].ffn
    parts = ("gate", "up", "down") if ffn.gate else ("up", "down")
    linears = {"gate": ffn.gate, "up": ffn.up}
    biases = tuple(p for p in parts[:-1] if linears[p].bias is not None)
    return RowShape(parts, biases, decoder.d_model)


def buckets(rows: int) -> list[int]:
    """How many rows ``ffn_rows_N`` takes, one function each: powers of two up to all rows."""
    whole = -(-rows // MULTIPLE) * MULTIPLE
    found = []
    size = SMALLEST_BUCKET
    while size < whole:
        found.append(size)
        size *= 2
    return [*found, whole]


def functions(
    decoder: Decoder,
    weights: Weights,
    context: int,
    cache_rows: int,
    int8: bool = False,
    target: str = "iOS18",
    fp32_residual: bool = True,
) -> dict[str, Any]:
    """MIL functions of the paged package by name."""
    builder = Builder(decoder, weights, 1, context, fp32_residual)
    shape = row_shape(decoder)
    made = {f"attention_{i}": _attention(builder, i, target) for i in range(len(decoder.layers))}
    for size in buckets(decoder.d_ffn):
        made[f"ffn_rows_{size}"] = _rows(decoder, shape, size, int8, target, fp32_residual)
    for size in NEW_ROWS:
        made[f"ffn_cache_{size}"] = _cached(
            decoder, shape, size, cache_rows, int8, target, fp32_residual
        )
    made["head"] = _head(builder, target)
    return made


def _function(body: Callable[..., Any], specs: list[Any], target: str = "iOS18") -> Any:
    return mb._create_function(body, specs, TARGETS[target])


def _hidden(width: int, fp32_residual: bool = False) -> Any:
    return mb.TensorSpec(shape=(1, 1, width), dtype=types.fp32 if fp32_residual else types.fp16)


def _attention(builder: Builder, index: int, target: str) -> Any:
    decoder, context = builder.decoder, builder.context
    part = decoder.layers[index]

    def body(hidden, position, causalMask, keyCache, valueCache):  # noqa: ANN001, ANN202
        x = builder.enter(hidden, position) if index == 0 else hidden
        if index > 0:
            x = builder.leave(x, decoder.layers[index - 1])
        turns, bias = builder.rope(position), builder.alibi(position)
        width = decoder.kv_heads * decoder.head_dim
        states = [keyCache, valueCache]
        cache = Cache(position, causalMask, turns, bias, 1, context, width, states)
        x, normed = builder.attend(x, part, cache, 0)
        if part.ffn.down.bias:  # FFN functions hold no weights
            x = mb.add(x=x, y=builder.to_residual(builder.weights.vector(part.ffn.down.bias)))
        return (
            mb.identity(x=x, name="residual"),
            mb.identity(x=normed, name="ffnInput"),
        )

    specs = [
        _hidden(decoder.d_embedding)
        if index == 0
        else _hidden(decoder.d_model, builder.fp32_residual),
        mb.TensorSpec(shape=(1,), dtype=types.int32),
        mb.TensorSpec(shape=(1, 1, 1, context), dtype=types.fp16),
        state(context, decoder),
        state(context, decoder),
    ]
    return _function(body, specs, target)


def _over(decoder: Decoder, shape: RowShape, residual: Any, x: Any, rows: Any, count: int) -> Any:
    """The FFN over rows [count, width]; rows of zeros add nothing."""
    d = shape.d_model
    part = decoder.layers[0].ffn

    def columns(at: int, width: int) -> Any:
        return mb.slice_by_index(x=rows, begin=[0, at], end=[count, at + width])

    flat = mb.reshape(x=x, shape=[1, d])
    values = {}
    for i, name in enumerate(shape.parts[:-1]):
        y = mb.matmul(x=flat, y=columns(i * d, d), transpose_y=True)
        if name in shape.biases:
            at = len(shape.parts) * d + shape.biases.index(name)
            y = mb.add(x=y, y=mb.reshape(x=columns(at, 1), shape=[1, count]))
        values[name] = y
    first = values.get("gate", values["up"])
    hidden, factor = activate(
        first, values["up"] if "gate" in values else None, part, residual.dtype == types.fp32
    )
    y = mb.matmul(x=hidden, y=columns((len(shape.parts) - 1) * d, d))
    if factor is not None:
        y = mb.mul(x=y, y=factor)
    y = mb.reshape(x=y, shape=[1, 1, d])
    if residual.dtype == types.fp32:
        y = mb.cast(x=y, dtype="fp32")
    y = mb.add(x=residual, y=y)
    return mb.identity(x=y, name="hiddenOut")


def _dequantised(shape: RowShape, rows: Any, extra: Any, count: int) -> Any:
    """Rows of int8 with their scales and biases as rows of float16."""
    d = shape.d_model
    pieces = []
    for i in range(len(shape.parts)):
        codes = mb.slice_by_index(x=rows, begin=[0, i * d], end=[count, (i + 1) * d])
        scale = mb.slice_by_index(x=extra, begin=[0, i], end=[count, i + 1])
        pieces.append(mb.mul(x=mb.cast(x=codes, dtype="fp16"), y=scale))
    if shape.biases:
        biases = mb.slice_by_index(x=extra, begin=[0, len(shape.parts)], end=[count, shape.extra])
        pieces.append(biases)
    if rest := shape.width - shape.codes - len(shape.biases):
        pieces.append(np.zeros((count, rest), np.float16))
    return mb.concat(values=pieces, axis=1)


def _row_specs(shape: RowShape, count: int, int8: bool) -> list[Any]:
    if not int8:
        return [mb.TensorSpec(shape=(count, shape.width), dtype=types.fp16)]
    return [
        mb.TensorSpec(shape=(count, shape.codes), dtype=types.int8),
        mb.TensorSpec(shape=(count, shape.extra), dtype=types.fp16),
    ]


def _rows(
    decoder: Decoder, shape: RowShape, count: int, int8: bool, target: str, fp32_residual: bool
) -> Any:
    def body(residual, ffnInput, rows):  # noqa: ANN001, ANN202
        return _over(decoder, shape, residual, ffnInput, rows, count)

    def coded(residual, ffnInput, rows, extra):  # noqa: ANN001, ANN202
        return body(residual, ffnInput, _dequantised(shape, rows, extra, count))

    ends = [_hidden(shape.d_model, fp32_residual), _hidden(shape.d_model)]
    specs = [*ends, *_row_specs(shape, count, int8)]
    return _function(coded if int8 else body, specs, target)


def _cached(
    decoder: Decoder,
    shape: RowShape,
    new: int,
    capacity: int,
    int8: bool,
    target: str,
    fp32_residual: bool,
) -> Any:
    def body(residual, ffnInput, newRows, slots, rowCache):  # noqa: ANN001, ANN202
        held = mb.read_state(input=rowCache)
        held = mb.scatter(data=held, indices=slots, updates=newRows, axis=0, mode="update")
        held = mb.coreml_update_state(state=rowCache, value=held)
        return _over(decoder, shape, residual, ffnInput, held, capacity)

    def coded(residual, ffnInput, newRows, extra, slots, rowCache):  # noqa: ANN001, ANN202
        return body(residual, ffnInput, _dequantised(shape, newRows, extra, new), slots, rowCache)

    specs = [
        _hidden(shape.d_model, fp32_residual),
        _hidden(shape.d_model),
        *_row_specs(shape, new, int8),
        mb.TensorSpec(shape=(new,), dtype=types.int32),
        mb.StateTensorSpec(shape=(capacity, shape.width), dtype=types.fp16),
    ]
    return _function(coded if int8 else body, specs, target)


def _head(builder: Builder, target: str) -> Any:
    def body(hidden):  # noqa: ANN001, ANN202
        x = builder.leave(hidden, builder.decoder.layers[-1])
        return mb.identity(x=builder.head(x), name="logits")

    return _function(body, [_hidden(builder.decoder.d_model, builder.fp32_residual)], target)


def row_layout(decoder: Decoder, int8: bool) -> RowLayout:
    """How a row lies in the row file."""
    shape = row_shape(decoder)
    if not int8:
        return RowLayout.of([("row", "F16", (shape.width,))])
    parts = [("row", "U8", (shape.codes,)), ("extra", "F16", (shape.extra,))]
    return RowLayout.of(parts, pad=False)

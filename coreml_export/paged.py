"""The decoder with its FFN rows outside: attention per layer, FFN over given or cached rows, head.

A token takes, for each layer, a call of ``attention_i``, of ``predict_i`` (see ``predictor``) and
of one FFN function, then one of ``head``. FFN functions hold no weights and serve all layers:
``ffn_rows_N`` computes over N rows that the caller hands over; ``ffn_cache_N`` first scatters N new
rows into a state of rows that stays with Core ML, then computes over all of it (a sliding window as
a state). A row is as it lies in the row file: gate, up and down one behind the other, then biases.

Knows: names, shapes, states of the functions. Does not know: which rows are wanted (``host``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .architecture import Decoder
from .decoder import MULTIPLE, state
from .mil import TARGETS, mb, types
from .parts import Builder, Cache, activate
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


def row_shape(decoder: Decoder) -> RowShape:
    """The shape of a decoder's rows."""
    ffn = decoder.layers[0].ffn
    parts = ("gate", "up", "down") if ffn.gate else ("up", "down")
    linears = {"gate": ffn.gate, "up": ffn.up}
    biases = tuple(p for p in parts[:-1] if linears[p].bias is not None)
    return RowShape(parts, biases, decoder.d_model)


def buckets(rows: int) -> list[int]:
    """Numbers of rows that there are functions for: powers of two up to all rows."""
    whole = -(-rows // MULTIPLE) * MULTIPLE
    found = []
    size = SMALLEST_BUCKET
    while size < whole:
        found.append(size)
        size *= 2
    return [*found, whole]


def functions(decoder: Decoder, weights: Weights, context: int, cache_rows: int) -> dict[str, Any]:
    """MIL functions of the paged package by name."""
    builder = Builder(decoder, weights, 1, context)
    shape = row_shape(decoder)
    made = {f"attention_{i}": _attention(builder, i) for i in range(len(decoder.layers))}
    for size in buckets(decoder.d_ffn):
        made[f"ffn_rows_{size}"] = _rows(decoder, shape, size)
    for size in NEW_ROWS:
        made[f"ffn_cache_{size}"] = _cached(decoder, shape, size, cache_rows)
    made["head"] = _head(builder)
    return made


def _function(body: Callable[..., Any], specs: list[Any]) -> Any:
    return mb._create_function(body, specs, TARGETS["iOS18"])


def _hidden(width: int) -> Any:
    return mb.TensorSpec(shape=(1, 1, width), dtype=types.fp16)


def _after(builder: Builder, x: Any, layer: int) -> Any:
    """What a layer that norms last still has to do after its FFN."""
    if layer < 0 or builder.decoder.layers[layer].order != "post":
        return x
    return builder.norm(x, builder.decoder.layers[layer].ffn_norm)


def _attention(builder: Builder, index: int) -> Any:
    decoder, context = builder.decoder, builder.context
    part = decoder.layers[index]

    def body(hidden, position, causalMask, keyCache, valueCache):  # noqa: ANN001, ANN202
        x = builder.enter(hidden, position) if index == 0 else _after(builder, hidden, index - 1)
        turns, bias = builder.rope(position), builder.alibi(position)
        width = decoder.kv_heads * decoder.head_dim
        states = [keyCache, valueCache]
        cache = Cache(position, causalMask, turns, bias, 1, context, width, states)
        if part.order == "post":
            y = builder.attention(x, part.attention, cache, 0)
            x = normed = builder.norm(mb.add(x=x, y=y), part.attention_norm)
        else:
            normed = builder.norm(x, part.attention_norm)
            attended = builder.attention(normed, part.attention, cache, 0)
            if part.order == "parallel" and part.ffn_norm:
                normed = builder.norm(x, part.ffn_norm)
            x = mb.add(x=x, y=attended)
            if part.order == "pre":
                normed = builder.norm(x, part.ffn_norm)
        if part.ffn.down.bias:  # FFN functions hold no weights
            x = mb.add(x=x, y=builder.weights.vector(part.ffn.down.bias))
        return (
            mb.identity(x=x, name="residual"),
            mb.identity(x=normed, name="ffnInput"),
        )

    specs = [
        _hidden(decoder.d_embedding if index == 0 else decoder.d_model),
        mb.TensorSpec(shape=(1,), dtype=types.int32),
        mb.TensorSpec(shape=(1, 1, 1, context), dtype=types.fp16),
        state(context, decoder),
        state(context, decoder),
    ]
    return _function(body, specs)


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
    hidden, factor = activate(first, values["up"] if "gate" in values else None, part)
    y = mb.matmul(x=hidden, y=columns((len(shape.parts) - 1) * d, d))
    if factor is not None:
        y = mb.mul(x=y, y=factor)
    y = mb.add(x=residual, y=mb.reshape(x=y, shape=[1, 1, d]))
    return mb.identity(x=y, name="hiddenOut")


def _rows(decoder: Decoder, shape: RowShape, count: int) -> Any:
    def body(residual, ffnInput, rows):  # noqa: ANN001, ANN202
        return _over(decoder, shape, residual, ffnInput, rows, count)

    rows = mb.TensorSpec(shape=(count, shape.width), dtype=types.fp16)
    return _function(body, [_hidden(shape.d_model), _hidden(shape.d_model), rows])


def _cached(decoder: Decoder, shape: RowShape, new: int, capacity: int) -> Any:
    def body(residual, ffnInput, newRows, slots, rowCache):  # noqa: ANN001, ANN202
        held = mb.read_state(input=rowCache)
        held = mb.scatter(data=held, indices=slots, updates=newRows, axis=0, mode="update")
        held = mb.coreml_update_state(state=rowCache, value=held)
        return _over(decoder, shape, residual, ffnInput, held, capacity)

    specs = [
        _hidden(shape.d_model),
        _hidden(shape.d_model),
        mb.TensorSpec(shape=(new, shape.width), dtype=types.fp16),
        mb.TensorSpec(shape=(new,), dtype=types.int32),
        mb.StateTensorSpec(shape=(capacity, shape.width), dtype=types.fp16),
    ]
    return _function(body, specs)


def _head(builder: Builder) -> Any:
    def body(hidden):  # noqa: ANN001, ANN202
        x = _after(builder, hidden, len(builder.decoder.layers) - 1)
        return mb.identity(x=builder.head(x), name="logits")

    return _function(body, [_hidden(builder.decoder.d_model)])


def rows_of_layer(weights: Weights, decoder: Decoder, layer: int) -> np.ndarray:
    """All rows of a layer as they lie in the row file, fp16 [rows, width].

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
        rows[:, len(shape.parts) * d + i] = weights.read(linears[name].bias)
    return rows

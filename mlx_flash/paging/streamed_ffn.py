"""FFNs whose rows are all streamed from flash for every call."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.models.families import Ffn
from mlx_flash.models.quantized_rows import QuantScheme

from .layer_stream import LayerStream
from .row_linear import bind
from .row_weights import bind_arrays, first_row


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
        scheme: QuantScheme | None = None,
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


class FlashLayer(nn.Module):
    """mlx-lm's FFN of one layer, all its weights streamed from flash for every call.

    Args:
        mlp: mlx-lm's module; its arrays are replaced.
        layer: number of the layer in the row file.
        stream: hands out the layer's row.
    """

    def __init__(self, mlp: nn.Module, layer: int, stream: LayerStream) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer = layer
        self._stream = stream
        bind_arrays(mlp, first_row(stream.memories(layer)[0]))  # in place of what it was made with

    def __call__(self, x: mx.array, *args: object, **kwargs: object) -> mx.array:
        bind_arrays(self.mlp, first_row(self._stream.acquire(self.layer, x)))
        y = self.mlp(x, *args, **kwargs)
        self._stream.done(y)
        return y

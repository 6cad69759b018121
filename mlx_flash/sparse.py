"""An FFN of which only the rows that fire are read: predict, fetch what is missing, compute.

The method of LLM in a flash (section 3). For a few tokens at a time the union of their rows is
brought into the layer's slots; more of them than there are slots are read through a pair of shared
buffers and added up. A long prompt wants nearly every row, so it is computed from all of them,
streamed through the same buffers: dense, whatever the predictor would have said.

Knows: one layer's predictor, its cache, mlx-lm's FFN module after ``use_rows``. Does not know:
families beyond ``Ffn``, budgets, how predictors come about.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cache import RowCache, SlotMemory
from .errors import FlashError
from .families import Ffn
from .ffn import bind_some
from .predictor import Predictor, ResidentPart
from .reader import RowReader

LONG_PROMPT = 64  # tokens from which on nobody is asked which rows they need
STREAM_SHARE = 0.5  # of the rows; when several tokens need more, all are streamed
PREFIX_SHARE = 2  # up to so many cached rows for each active one, all cached ones are computed
CHUNK_BYTES = 8 << 20  # of each of the two buffers, at most
CHUNK_SHARE = 4  # and one row in so many


def chunk_rows(stride: int, rows: int) -> int:
    """How many rows a buffer holds."""
    return max(1, min(-(-rows // CHUNK_SHARE), CHUNK_BYTES // stride))


class RowStream:
    """Any rows of any layer in order, through two buffers, one read while the other is computed."""

    def __init__(self, reader: RowReader, rows: int) -> None:
        self.capacity = chunk_rows(reader.layout.stride, rows)
        self.wait_seconds = 0.0
        self.rows_read = 0
        self._reader = reader
        self._buffers = [SlotMemory(reader.layout, self.capacity) for _ in range(2)]

    def pieces(
        self, layer: int, rows: np.ndarray, skip: str | None
    ) -> Iterator[tuple[np.ndarray, dict[str, mx.array]]]:
        """(row numbers, part -> [n, width]) piece by piece.

        What is computed from a piece must have been evaluated when the next but one is asked for.

        Args:
            skip: a part that is not needed.
        """
        reader = self._reader
        pieces = [rows[at : at + self.capacity] for at in range(0, rows.size, self.capacity)]
        views = [
            [
                None if part.name == skip else view
                for part, view in zip(reader.layout.parts, buffer.views, strict=True)
            ]
            for buffer in self._buffers
        ]

        def start(i: int) -> list[Any]:
            piece = pieces[i]
            slots = np.arange(piece.size)
            return reader.submit(layer, reader.prepare(piece, slots, views[i % 2]))

        under_way = start(0) if pieces else []
        try:
            for i, piece in enumerate(pieces):
                began = time.perf_counter()
                reader.wait(under_way)
                self.wait_seconds += time.perf_counter() - began
                self.rows_read += piece.size
                under_way = start(i + 1) if i + 1 < len(pieces) else []
                arrays = self._buffers[i % 2].arrays
                yield piece, {name: a[: piece.size] for name, a in arrays.items() if name != skip}
        finally:
            reader.drop(under_way)


@dataclass
class SparseStats:
    """What the layers of a model have counted since loading, all of them together.

    ``predicted`` counts rows asked for; ``predict_seconds`` and ``manage_seconds`` the time for
    saying which, and for bookkeeping and handing row numbers over, reading not included.
    """

    predicted: int = 0
    layer_calls: int = 0
    predict_seconds: float = 0.0
    manage_seconds: float = 0.0


class SparseMLP(nn.Module):
    """mlx-lm's FFN of one layer, computed from the rows that a predictor names.

    Args:
        mlp: mlx-lm's module after ``use_rows``.
        ffn: where its projections are.
        predictor: which rows a token needs.
        cache: the layer's slots, without the part that the predictor provides.
        stream: for rows that the slots do not hold, shared by all layers.
        stats: counters, shared by all layers.
    """

    def __init__(
        self,
        mlp: nn.Module,
        ffn: Ffn,
        predictor: Predictor,
        cache: RowCache,
        stream: RowStream,
        stats: SparseStats,
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer = cache.layer
        self._ffn = ffn
        self._predictor = predictor
        self._cache = cache
        self._stream = stream
        self._stats = stats

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        rows = self._cache.table.rows
        hidden = self.mlp[self._ffn.norm](x) if self._ffn.norm else x
        if (tokens := x.size // x.shape[-1]) >= LONG_PROMPT:
            return self._dense(x, hidden, args, kwargs)
        mx.eval(hidden)  # else what came before would count as predicting
        began = time.perf_counter()
        prediction = self._predictor(hidden)
        self._stats.predict_seconds += time.perf_counter() - began
        self._stats.predicted += prediction.rows.size
        self._stats.layer_calls += 1
        if tokens > 1 and prediction.rows.size > STREAM_SHARE * rows:
            return self._dense(x, hidden, args, kwargs)
        began, waited = time.perf_counter(), self._cache.wait_seconds
        inside, outside = self._cache.fetch_some(prediction.rows)
        waited = self._cache.wait_seconds - waited
        known = None
        if prediction.values is not None and self._predictor.provides:
            known = (self._predictor.provides, prediction.values)
        if outside.size or not inside.size:
            return self._add_up(x, outside, inside, known, args, kwargs)
        arrays, index = self._slots(inside)
        bind_some(self.mlp, self._ffn, arrays, index, known)
        self._stats.manage_seconds += time.perf_counter() - began - waited
        y = self.mlp(x, *args, **kwargs)
        self._cache.built(y)
        return y

    def _slots(self, active: np.ndarray, exactly: bool = False) -> tuple[dict[str, mx.array], Any]:
        """(part -> [n, width], row numbers) of the active rows, or of all that are cached.

        All of them cost no copy and are right, too: a row that was not predicted and fires all the
        same (LLM in a flash, section 3.3).
        """
        table, memory = self._cache.table, self._cache.memory
        if not exactly and table.num_used <= PREFIX_SHARE * active.size:
            return {n: self._cache.part(n) for n in memory.arrays}, self._cache.index()
        slots = mx.array(table.slot_of[active])
        gathered = {name: mx.take(array, slots, axis=0) for name, array in memory.arrays.items()}
        return gathered, mx.array(active.astype(np.int32))

    def _dense(self, x: mx.array, hidden: mx.array, args: Any, kwargs: Any) -> mx.array:
        """The FFN over every row, all of them streamed."""
        known = None
        if isinstance(self._predictor, ResidentPart):
            known = (self._predictor.provides, self._predictor.values(hidden))
        return self._add_up(x, np.arange(self._cache.table.rows), None, known, args, kwargs)

    def _add_up(
        self,
        x: mx.array,
        streamed: np.ndarray,
        cached: np.ndarray | None,
        known: tuple[str, mx.array] | None,
        args: Any,
        kwargs: Any,
    ) -> mx.array:
        """The FFN over rows that are in slots and rows that are streamed; summed in float32."""
        total: mx.array | None = None

        def add(arrays: dict[str, mx.array], index: mx.array) -> None:
            nonlocal total
            bind_some(self.mlp, self._ffn, arrays, index, known, partial=True)
            y = self.mlp(x, *args, **kwargs)
            if y.dtype != mx.float32:
                raise FlashError(
                    f"layer {self.layer}: the FFN of this family does more with its output than "
                    "can be added up; load the model with predictor='none'"
                )
            total = y if total is None else total + y

        if cached is not None and cached.size:
            add(*self._slots(cached, exactly=True))
        skip = known[0] if known else None
        for piece, arrays in self._stream.pieces(self.layer, streamed, skip):
            add(arrays, mx.array(piece.astype(np.int32)))
            mx.eval(total)
        if total is None:
            total = mx.zeros(x.shape, mx.float32)
        self._cache.built(total)
        down = self.mlp[self._ffn.down]
        if "bias" in down:
            total = total + down.bias.astype(mx.float32)
        return total.astype(x.dtype)

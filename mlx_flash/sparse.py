"""An FFN of which only the rows that fire are read: predict, fetch what is missing, compute.

The method of LLM in a flash (section 3). For a few tokens at a time the union of their rows is
gathered in a buffer, in ascending order: those that the layer's slots hold are copied, the others
read. Rows that are worth it are then copied into slots; the rest pass by. A long prompt wants
nearly every row, so it is computed from all of them, streamed through the same buffers: dense,
whatever the predictor would have said.

Knows: one layer's predictor, its cache, mlx-lm's FFN module after ``use_rows``. Does not know:
families beyond ``Ffn``, budgets, how predictors come about.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cache import RowCache
from .errors import FlashError
from .families import Ffn
from .ffn import bind_some
from .layout import RowLayout
from .packed import Rows, Scheme, rows_of
from .predictor import Prediction, Predictor, ResidentPart
from .reader import RowReader
from .slots import SlotMemory, slot_bytes

LONG_PROMPT = 64  # tokens from which on nobody is asked which rows they need
STREAM_SHARE = 0.5  # of the rows; when several tokens need more, all are streamed
CHUNK_BYTES = 64 << 20  # of each of the two buffers, at most
CHUNK_SHARE = 4  # and one row in so many


def chunk_rows(stride: int, rows: int) -> int:
    """How many rows a buffer holds."""
    return max(1, min(-(-rows // CHUNK_SHARE), CHUNK_BYTES // stride))


@dataclass
class _Piece:
    """Some of the rows wanted, in ascending order, on their way into a buffer."""

    rows: np.ndarray
    here: np.ndarray  # slots, -1 for what has to be read
    keep: np.ndarray  # slots to copy to, -1 for what passes by
    reads: list[Future[None]] = field(default_factory=list)


class RowStream:
    """Rows of any layer in ascending order, from slots and from flash, through two buffers.

    While one buffer is computed from, the other is filled. The order is the dense model's, so where
    the rows fit one buffer their sum is the dense one's to the bit. All layers share the buffers.

    Args:
        reader: reads the rows.
        rows: of the largest layer.
        parts: of a row, those that are needed; None for all.
        exact: see ``SlotMemory``.
    """

    def __init__(
        self,
        reader: RowReader,
        rows: int,
        parts: Sequence[str] | None = None,
        exact: bool = False,
    ) -> None:
        self.capacities = {
            layout: chunk_rows(layout.stride, rows) for layout in reader.file.layouts
        }
        self.wait_seconds = 0.0
        self.rows_read = 0
        self._reader = reader
        self._buffers = [self._memories(parts, exact) for _ in range(2)]
        self._built_on: list[list[mx.array]] = [[], []]
        self._turn = 0

    def _memories(self, parts: Sequence[str] | None, exact: bool) -> dict[RowLayout, SlotMemory]:
        """One buffer, laid out for each kind of row; all share its memory."""
        largest = max(
            self.capacities, key=lambda one: self.capacities[one] * slot_bytes(one, parts)
        )
        memory = SlotMemory(largest, self.capacities[largest], parts=parts, exact=exact)
        rest = {
            layout: SlotMemory(layout, count, share=memory, parts=parts, exact=exact)
            for layout, count in self.capacities.items()
            if layout != largest
        }
        return {largest: memory, **rest}

    def capacity(self, layer: int) -> int:
        """Rows of a layer that fit one buffer."""
        return self.capacities[self._reader.file.layers[layer].layout]

    def pieces(
        self, layer: int, rows: np.ndarray, cache: RowCache | None
    ) -> Iterator[tuple[np.ndarray, dict[str, mx.array]]]:
        """(row numbers, part -> [n, width]) piece by piece.

        Args:
            rows: int [n], sorted.
            cache: the layer's slots, which the rows are taken from where they are there, and where
                they are kept; None to read all and keep none.
        """
        size = self.capacity(layer)
        todo: list[_Piece] = []
        with cache.sound() if cache else contextlib.nullcontext():
            try:
                if cache:
                    here, keep = cache.claim(rows)
                else:
                    here = keep = np.full(rows.size, -1)
                todo += [
                    _Piece(*(array[at : at + size] for array in (rows, here, keep)))
                    for at in range(0, rows.size, size)
                ]
                for i, piece in enumerate(todo):
                    if i == 0:
                        self._start(layer, piece, cache)
                    buffer = self._buffer(layer)
                    began = time.perf_counter()
                    self._reader.wait(piece.reads)
                    self.wait_seconds += time.perf_counter() - began
                    if cache:
                        _keep(piece, buffer, cache)
                    turn = self._turn
                    self._turn = 1 - turn
                    if i + 1 < len(todo):
                        self._start(layer, todo[i + 1], cache)
                    self._handed_out = turn
                    count = piece.rows.size
                    yield piece.rows, {n: a[:count] for n, a in buffer.arrays.items()}
            finally:
                self._reader.drop([read for piece in todo for read in piece.reads])

    def _buffer(self, layer: int) -> SlotMemory:
        return self._buffers[self._turn][self._reader.file.layers[layer].layout]

    def built(self, result: mx.array) -> None:
        """Say which lazy array reads the piece handed out last; it is set going."""
        mx.async_eval(result)
        self._built_on[self._handed_out].append(result)

    def _start(self, layer: int, piece: _Piece, cache: RowCache | None) -> None:
        """Fill the buffer whose turn it is: copy what is in slots, begin to read the rest."""
        buffer = self._buffer(layer)
        mx.eval(self._built_on[self._turn])
        self._built_on[self._turn].clear()
        missing = np.flatnonzero(piece.here < 0)
        if cache and missing.size < piece.rows.size:
            for source, target in zip(cache.memory.views, buffer.views, strict=True):
                if source is not None and target is not None:
                    # What is missing is copied from slot 0 and read over: cheaper than two passes.
                    count = piece.rows.size
                    np.take(source, piece.here, axis=0, out=target[:count], mode="clip")
        if missing.size:
            prepared = self._reader.prepare(piece.rows[missing], missing, buffer.views, layer)
            piece.reads = self._reader.submit(layer, prepared)
            self.rows_read += missing.size


def _keep(piece: _Piece, buffer: SlotMemory, cache: RowCache) -> None:
    """Copy what was read and has a slot into it."""
    kept = np.flatnonzero(piece.keep >= 0)
    if not kept.size:
        return
    for source, target in zip(buffer.views, cache.memory.views, strict=True):
        if source is not None and target is not None:
            target[piece.keep[kept]] = source[kept]


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
        scheme: how rows are packed; None for floats.
    """

    def __init__(
        self,
        mlp: nn.Module,
        ffn: Ffn,
        predictor: Predictor,
        cache: RowCache,
        stream: RowStream,
        stats: SparseStats,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer = cache.layer
        self._ffn = ffn
        self._predictor = predictor
        self._cache = cache
        # LLM in a flash, section 3.3: over all that is in slots, without a copy. A row that was not
        # predicted and fires all the same is simply right.
        self._on_prefix = not predictor.exact and not predictor.provides and cache.is_window
        self._stream = stream
        self._stats = stats
        self._scheme = scheme

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
        return self._compute(x, prediction, args, kwargs)

    def wanted(self, x: mx.array) -> list[np.ndarray]:
        """Rows that each token of x [..., d_model] is taken to need, for those who record it."""
        hidden = self.mlp[self._ffn.norm](x) if self._ffn.norm else x
        tokens = hidden.reshape(-1, hidden.shape[-1])
        return [self._predictor(tokens[i : i + 1]).rows for i in range(tokens.shape[0])]

    def _compute(self, x: mx.array, prediction: Prediction, args: Any, kwargs: Any) -> mx.array:
        """The FFN over the predicted rows."""
        provides = self._predictor.provides
        known = None
        if prediction.values is not None and provides:
            known = (provides, prediction.values)
        cache = self._cache
        if not self._on_prefix or prediction.rows.size > cache.table.capacity:
            return self._add_up(x, prediction.rows, known, cache, args, kwargs)
        began, waited = time.perf_counter(), cache.wait_seconds
        cache.fetch(prediction.rows)
        arrays = {name: cache.part(name) for name in cache.memory.arrays}
        bind_some(self.mlp, self._ffn, self._rows(arrays), cache.index(), known)
        waited = cache.wait_seconds - waited
        self._stats.manage_seconds += time.perf_counter() - began - waited
        y = self.mlp(x, *args, **kwargs)
        cache.built(y)
        return y

    def _rows(self, arrays: dict[str, mx.array]) -> dict[str, Rows]:
        """Part -> rows, packed or not."""
        names = [name for name in self._ffn.parts if name in arrays]
        return {name: rows_of(arrays, name, self._scheme) for name in names}

    def _dense(self, x: mx.array, hidden: mx.array, args: Any, kwargs: Any) -> mx.array:
        """The FFN over every row, all of them streamed."""
        known, rows = None, np.arange(self._cache.table.rows)
        if isinstance(self._predictor, ResidentPart):
            known = (self._predictor.provides, self._predictor.values(hidden))
        return self._add_up(x, rows, known, None, args, kwargs)

    def _add_up(
        self,
        x: mx.array,
        rows: np.ndarray,
        known: tuple[str, mx.array] | None,
        cache: RowCache | None,
        args: Any,
        kwargs: Any,
    ) -> mx.array:
        """The FFN over rows that are streamed; of more than one piece summed in float32."""
        stream = self._stream
        many = not 0 < rows.size <= stream.capacity(self.layer)
        total: mx.array | None = None
        began, waited = time.perf_counter(), stream.wait_seconds
        for piece, arrays in stream.pieces(self.layer, rows, cache):
            index = mx.array(piece.astype(np.int32))
            bind_some(self.mlp, self._ffn, self._rows(arrays), index, known, partial=many)
            y = self.mlp(x, *args, **kwargs)
            if many and y.dtype != mx.float32:
                raise FlashError(
                    f"layer {self.layer}: the FFN of this family does more with its output than "
                    "can be added up; load the model with predictor='none'"
                )
            total = y if total is None else total + y
            stream.built(total)
        if not many and cache:
            waited = stream.wait_seconds - waited
            self._stats.manage_seconds += time.perf_counter() - began - waited
        if total is None:
            total = mx.zeros(x.shape, mx.float32)
        if not many:
            return total
        down = self.mlp[self._ffn.down]
        if "bias" in down:
            total = total + down.bias.astype(mx.float32)
        return total.astype(x.dtype)

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

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import FlashError
from mlx_flash.models.families import Ffn
from mlx_flash.models.quantized_rows import QuantScheme, Rows, rows_of
from mlx_flash.predictors.predictor import Prediction, Predictor

from .prefetch import Foresight
from .row_linear import bind_some
from .row_stream import RowStream
from .slots.row_cache import RowCache

LONG_PROMPT = 64  # tokens from which on nobody is asked which rows they need
STREAM_SHARE = 0.5  # of the rows; when several tokens need more, all are streamed


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
        foresight: says what the next layer may need; None for no reading ahead.
    """

    def __init__(
        self,
        mlp: nn.Module,
        ffn: Ffn,
        predictor: Predictor,
        cache: RowCache,
        stream: RowStream,
        stats: SparseStats,
        scheme: QuantScheme | None = None,
        foresight: Foresight | None = None,
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer = cache.layer
        self._foresight = foresight
        self._ffn = ffn
        self._predictor = predictor
        self._cache = cache
        # LLM in a flash, section 3.3: over all that is in slots, without a copy. A row that was not
        # predicted and fires all the same is simply right.
        self._on_prefix = not predictor.exact and not predictor.provides and cache.policy.is_window
        # Where nothing is exact anyway: rows may come in the order in which they are foretold.
        self.in_any_order = not (predictor.exact or predictor.provides or self._on_prefix)
        self._stream = stream
        self._stats = stats
        self._scheme = scheme

    def foresee(self, foresight: Foresight) -> None:
        """Read ahead by this from now on."""
        self._foresight = foresight

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
        if self.in_any_order and 0 < prediction.rows.size <= self._stream.capacity(self.layer):
            return self._from_buffer(x, hidden, prediction.rows, args, kwargs)
        return self._compute(x, prediction, args, kwargs)

    def _from_buffer(
        self, x: mx.array, hidden: mx.array, rows: np.ndarray, args: Any, kwargs: Any
    ) -> mx.array:
        """The FFN over predicted rows and those that were foretold; then the next layer's turn."""
        stream, cache = self._stream, self._cache
        began, waited = time.perf_counter(), stream.wait_seconds
        with stream.gather(self.layer, rows, cache) as (order, arrays):
            index = mx.array(order.astype(np.int32))
            bind_some(self.mlp, self._ffn, self._rows(arrays), index, None)
            y = self.mlp(x, *args, **kwargs)
            stream.retain_until_evaluated(y)
            waited = stream.wait_seconds - waited
            self._stats.manage_seconds += time.perf_counter() - began - waited
        if self._foresight and x.size == x.shape[-1]:
            self._foresight(hidden)
        return y

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
        # Of no rows at all nothing may be computed: MLX's quantised products crash on them.
        if not self._on_prefix or not 0 < prediction.rows.size <= cache.table.capacity:
            return self._add_up(x, prediction.rows, known, cache, args, kwargs)
        began, waited = time.perf_counter(), cache.wait_seconds
        cache.fetch(prediction.rows)
        arrays = {name: cache.part(name) for name in cache.memory.arrays}
        bind_some(self.mlp, self._ffn, self._rows(arrays), cache.index(), known)
        waited = cache.wait_seconds - waited
        self._stats.manage_seconds += time.perf_counter() - began - waited
        y = self.mlp(x, *args, **kwargs)
        cache.retain_until_evaluated(y)
        return y

    def _rows(self, arrays: dict[str, mx.array]) -> dict[str, Rows]:
        """Part -> rows, packed or not."""
        names = [name for name in self._ffn.parts if name in arrays]
        return {name: rows_of(arrays, name, self._scheme) for name in names}

    def _dense(self, x: mx.array, hidden: mx.array, args: Any, kwargs: Any) -> mx.array:
        """The FFN over every row, all of them streamed."""
        known, rows = None, np.arange(self._cache.table.rows)
        if part := self._predictor.provides:
            known = (part, self._predictor.values(hidden))
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
        for piece, arrays in stream.stream_chunks(self.layer, rows, cache):
            index = mx.array(piece.astype(np.int32))
            bind_some(self.mlp, self._ffn, self._rows(arrays), index, known, partial=many)
            y = self.mlp(x, *args, **kwargs)
            if many and y.dtype != mx.float32:
                raise FlashError(
                    f"layer {self.layer}: the FFN of this family does more with its output than "
                    "can be added up; load the model with predictor='none'"
                )
            total = y if total is None else total + y
            stream.retain_until_evaluated(total)
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

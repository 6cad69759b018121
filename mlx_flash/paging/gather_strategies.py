"""How the rows that a predictor names are brought together for an FFN.

Which way serves a layer follows from its predictor and its policy and is chosen once
(``choose_strategy``), when the model is put together:

    predictor                   policy      strategy
    exact, or keeps a part      any         OrderedGather: sums are the dense model's
    low-rank                    a window    Prefix: over all that is in slots, nothing copied
    low-rank                    another     PrefetchedGather: in the order in which rows come

``Streamed`` is for prompts, whatever the predictor: every row, past the slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import FlashError
from mlx_flash.models.families import Ffn
from mlx_flash.models.quantized_rows import QuantScheme, Rows, rows_of
from mlx_flash.predictors.predictor import Prediction, Predictor

from .prefetch import Prefetcher
from .row_linear import bind_some
from .row_stream import RowStream
from .slots.row_cache import RowCache

Known = tuple[str, mx.array]  # a part that need not be read, and its output for every row


@dataclass(frozen=True)
class Call:
    """One call of an FFN.

    Args:
        x: what mlx-lm gives the module, [..., d_model].
        hidden: what its projections take, [..., d_model]; other than x where the module norms.
        args, kwargs: what mlx-lm gives it beside x.
    """

    x: mx.array
    hidden: mx.array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return self.x.size // self.x.shape[-1]


class RowFfn:
    """mlx-lm's FFN module of one layer, computed over whichever rows it is given.

    Args:
        mlp: mlx-lm's module after ``use_rows``.
        ffn: where its projections are.
        scheme: how rows are packed; None for floats.
    """

    def __init__(self, mlp: nn.Module, ffn: Ffn, scheme: QuantScheme | None) -> None:
        self.mlp, self.ffn, self._scheme = mlp, ffn, scheme

    def call(self, x: mx.array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call, with what the module's norm makes of x."""
        return Call(x, self.mlp[self.ffn.norm](x) if self.ffn.norm else x, args, kwargs)

    def bind(
        self,
        arrays: dict[str, mx.array],
        index: mx.array,
        known: Known | None,
        partial: bool = False,
    ) -> None:
        """Compute from these rows next.

        Args:
            arrays: part -> [n, width].
            index: row numbers, int32 [n].
            partial: see ``RowLinear.bind``.
        """
        names = [name for name in self.ffn.parts if name in arrays]
        rows: dict[str, Rows] = {name: rows_of(arrays, name, self._scheme) for name in names}
        bind_some(self.mlp, self.ffn, rows, index, known, partial)

    def compute(self, call: Call) -> mx.array:
        """The module's output over the rows bound last, lazily."""
        return self.mlp(call.x, *call.args, **call.kwargs)

    def with_bias(self, total: mx.array) -> mx.array:
        """A float32 sum of partial outputs with the bias of the down projection, if it has one."""
        down = self.mlp[self.ffn.down]
        return total + down.bias.astype(mx.float32) if "bias" in down else total


class Strategy(Protocol):
    """Brings the rows of a prediction together and computes the FFN over them."""

    def __call__(self, call: Call, prediction: Prediction) -> mx.array:
        """The FFN's output, [..., d_model], lazily."""


class Streamed:
    """Every row, streamed in pieces past the slots: the dense FFN.

    Args:
        predictor: of the layer; the part that it provides is not read.
    """

    def __init__(
        self, ffn: RowFfn, predictor: Predictor, cache: RowCache, stream: RowStream
    ) -> None:
        self._sum = _Summed(ffn, cache.layer, stream)
        self._predictor = predictor
        self._rows = np.arange(cache.slots.table.rows)

    def __call__(self, call: Call) -> mx.array:
        """The FFN's output, [..., d_model], lazily."""
        known = None
        if part := self._predictor.provides:
            known = (part, self._predictor.values(call.hidden))
        return self._sum(call, self._rows, known, None)


class OrderedGather:
    """Predicted rows in ascending order, as the dense model sums them: the same to the bit.

    Rows come from slots and from flash into a buffer; those that are worth it are copied into slots
    from there.

    Args:
        provides: the part of a row that predictions bring the output of, if they do.
    """

    def __init__(
        self, ffn: RowFfn, cache: RowCache, stream: RowStream, provides: str | None = None
    ) -> None:
        self._sum = _Summed(ffn, cache.layer, stream)
        self._cache, self._provides = cache, provides

    def __call__(self, call: Call, prediction: Prediction) -> mx.array:
        """See ``Strategy``."""
        known = None
        if prediction.values is not None and self._provides:
            known = (self._provides, prediction.values)
        return self._sum(call, prediction.rows, known, self._cache)


class PrefetchedGather:
    """Predicted rows in the order in which they come, prefetched ones first.

    For predictors that are not exact: a row that was prefetched and not predicted is summed, too,
    and if it fires that is simply right.

    Args:
        otherwise: what to do with no rows, or more than a buffer holds.

    Attributes:
        prefetcher: brings the next layer's rows; None for bringing none.
    """

    def __init__(
        self, ffn: RowFfn, cache: RowCache, stream: RowStream, otherwise: OrderedGather
    ) -> None:
        self._ffn, self._cache, self._stream, self._otherwise = ffn, cache, stream, otherwise
        self.prefetcher: Prefetcher | None = None

    def __call__(self, call: Call, prediction: Prediction) -> mx.array:
        """See ``Strategy``."""
        rows, layer = prediction.rows, self._cache.layer
        # Of no rows at all nothing may be computed: MLX's quantised products crash on them.
        if not 0 < rows.size <= self._stream.capacity(layer):
            return self._otherwise(call, prediction)
        counters = self._cache.counters
        start = counters.start()
        with self._stream.gather(layer, rows, self._cache) as (order, arrays):
            self._ffn.bind(arrays, mx.array(order.astype(np.int32)), None)
            y = self._ffn.compute(call)
            self._stream.retain_until_evaluated(y)
            counters.count_managing(start)
        if self.prefetcher and call.tokens == 1:
            self.prefetcher.bring(self.prefetcher.predict(call.hidden))
        return y


class Prefix:
    """All rows that slots hold, computed from where they lie (LLM in a flash, section 3.3).

    For predictors that are not exact, under a window: rows of the last tokens that were not
    predicted for this one are summed, too, and if one fires that is simply right.

    Args:
        otherwise: what to do with no rows, or more than there are slots.
    """

    def __init__(self, ffn: RowFfn, cache: RowCache, otherwise: OrderedGather) -> None:
        self._ffn, self._cache, self._otherwise = ffn, cache, otherwise

    def __call__(self, call: Call, prediction: Prediction) -> mx.array:
        """See ``Strategy``."""
        slots, counters = self._cache.slots, self._cache.counters
        # Of no rows at all nothing may be computed: MLX's quantised products crash on them.
        if not 0 < prediction.rows.size <= slots.capacity:
            return self._otherwise(call, prediction)
        start = counters.start()
        self._cache.fetch(prediction.rows)
        self._ffn.bind(
            {name: slots.part(name) for name in slots.memory.arrays}, slots.index(), None
        )
        counters.count_managing(start)
        y = self._ffn.compute(call)
        slots.retain_until_evaluated(y)
        return y


def choose_strategy(
    ffn: RowFfn, predictor: Predictor, cache: RowCache, stream: RowStream
) -> Strategy:
    """The strategy that serves a layer best, see the module.

    Args:
        cache: the layer's slots, without the part that the predictor provides.
        stream: shared by all layers.
    """
    ordered = OrderedGather(ffn, cache, stream, predictor.provides)
    if predictor.exact or predictor.provides:
        return ordered
    if cache.slots.policy.is_window:
        return Prefix(ffn, cache, ordered)
    return PrefetchedGather(ffn, cache, stream, ordered)


class _Summed:
    """The FFN over rows in ascending order; of more than one piece summed in float32."""

    def __init__(self, ffn: RowFfn, layer: int, stream: RowStream) -> None:
        self._ffn, self._layer, self._stream = ffn, layer, stream

    def __call__(
        self, call: Call, rows: np.ndarray, known: Known | None, cache: RowCache | None
    ) -> mx.array:
        """The output, [..., d_model]; see ``RowStream.stream_chunks`` for the cache."""
        stream, counters = self._stream, self._stream.counters
        whole = 0 < rows.size <= stream.capacity(self._layer)
        total: mx.array | None = None
        start = counters.start()
        for piece, arrays in stream.stream_chunks(self._layer, rows, cache):
            self._ffn.bind(arrays, mx.array(piece.astype(np.int32)), known, partial=not whole)
            y = self._ffn.compute(call)
            if not whole and y.dtype != mx.float32:
                raise FlashError(
                    f"layer {self._layer}: the FFN of this family does more with its output than "
                    "can be added up; load the model with predictor='none'"
                )
            total = y if total is None else total + y
            stream.retain_until_evaluated(total)
        if whole and cache:
            counters.count_managing(start)
        if total is None:
            total = mx.zeros(call.x.shape, mx.float32)
        return total if whole else self._ffn.with_bias(total).astype(call.x.dtype)

"""An FFN of which only the rows that fire are read: predict, fetch what is missing, compute.

The method of LLM in a flash (section 3). Of a few tokens at a time the union of their rows is
brought together, see ``gather_strategies``. A long prompt wants nearly every row, so it is computed
from all of them: dense, whatever the predictor would have said.
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.predictors.predictor import Predictor

from .gather_strategies import RowFfn, Strategy, Streamed
from .slots.row_cache import RowCache

LONG_PROMPT = 64  # tokens; of so long a prompt, or a longer one, nothing is predicted
STREAM_SHARE = 0.5  # of the rows; when several tokens need more, all are streamed


class SparseMLP(nn.Module):
    """mlx-lm's FFN of one layer, computed from the rows that a predictor names.

    Args:
        ffn: mlx-lm's module, made ready.
        predictor: which rows a token needs.
        cache: the layer's slots, without the part that the predictor provides.
        gather: computes over predicted rows.
        streamed: computes over every row.
    """

    def __init__(
        self,
        ffn: RowFfn,
        predictor: Predictor,
        cache: RowCache,
        gather: Strategy,
        streamed: Streamed,
    ) -> None:
        super().__init__()
        self.mlp = ffn.mlp
        self.layer = cache.layer
        self.predictor = predictor
        self.gather = gather
        self._ffn, self._streamed = ffn, streamed
        self._counters, self._rows = cache.counters, cache.slots.table.rows

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        call = self._ffn.call(x, args, kwargs)
        if call.tokens >= LONG_PROMPT:
            return self._streamed(call)
        mx.eval(call.hidden)  # else what came before would count as predicting
        began = time.perf_counter()
        prediction = self.predictor(call.hidden)
        self._counters.predict_seconds += time.perf_counter() - began
        self._counters.predicted += prediction.rows.size
        self._counters.layer_calls += 1
        if call.tokens > 1 and prediction.rows.size > STREAM_SHARE * self._rows:
            return self._streamed(call)
        return self.gather(call, prediction)

    def wanted(self, x: mx.array) -> list[np.ndarray]:
        """Rows that the predictor names for each token of x [..., d_model]."""
        hidden = self._ffn.call(x, (), {}).hidden
        tokens = hidden.reshape(-1, hidden.shape[-1])
        return [self.predictor(tokens[i : i + 1]).rows for i in range(tokens.shape[0])]

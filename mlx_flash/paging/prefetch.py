"""Rows brought before their turn: what the next layer may need, by what this one is given.

Deja Vu's asynchronous predictor (arXiv 2310.17157, section 4.3): the next layer's predictor, or of
a mixture its router, is put to this layer's input. What attention and the FFN add in between moves
that input a little only. A row that is prefetched for nothing costs its bytes, and where rows are
summed in a buffer a row's sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flash.predictors.predictor import Predictor

TRIAL = 16  # steps after which a gate decides
# Share of the prefetched rows that have to be needed. A wrong neuron is read and summed for
# nothing; a wrong expert is read behind all else, and its slot is free again when it is needed.
LEAST_RIGHT = {"neuron": 0.7, "expert": 0.0}


@dataclass
class AccuracyGate:
    """How many of the rows predicted for a layer were needed, whatever was in slots.

    Args:
        least_right: share of the predicted rows that have to be needed for the gate to stay open.
    """

    least_right: float
    steps: int = 0
    predicted: int = 0
    right: int = 0

    def count(self, predicted: int, right: int) -> None:
        """Add a step: ``predicted`` rows, of which ``right`` were needed."""
        self.steps += 1
        self.predicted += predicted
        self.right += right

    @property
    def is_open(self) -> bool:
        """Whether to go on: until ``TRIAL`` steps have shown that too many rows are wrong."""
        return self.steps < TRIAL or self.right >= self.least_right * self.predicted


Predicted = np.ndarray | mx.array  # rows, see ``Prefetcher``
Predict = Callable[[mx.array], Predicted]
Sink = Callable[[np.ndarray, AccuracyGate], None]  # begins to read rows (sorted, distinct)


class Prefetcher:
    """Predicts which rows the next layer may need and begins to read them.

    Args:
        predict: hidden state [..., d_model] -> row numbers: sorted and distinct in a numpy array,
            or lazily, in any order and repeated, in an MLX array.
        sink: begins to read rows, and tells the gate of them once it is known which were needed.
        gate: nothing is predicted once it is shut.
    """

    def __init__(self, predict: Predict, sink: Sink, gate: AccuracyGate) -> None:
        self._predict, self._sink, self.gate = predict, sink, gate

    def predict(self, hidden: mx.array) -> Predicted | None:
        """What ``bring`` takes, maybe lazily; None where the gate is shut."""
        return self._predict(hidden) if self.gate.is_open else None

    def bring(self, predicted: Predicted | None) -> None:
        """Begin to read what ``predict`` returned."""
        if predicted is None:
            return
        if isinstance(predicted, mx.array):
            predicted = np.unique(np.array(predicted, copy=False))
        self._sink(predicted, self.gate)


def rows_beside(predictor: Predictor) -> Predict:
    """Rows that a predictor names, computed beside whatever MLX is computing already."""
    beside = mx.new_thread_local_stream(mx.default_device())

    def predict(hidden: mx.array) -> np.ndarray:
        with mx.stream(beside):
            return predictor(hidden).rows

    return predict


def best_experts(scores: mx.array, top_k: int) -> mx.array:
    """Numbers of the experts with the highest scores [..., experts], lazily, [..., top_k]."""
    return mx.argpartition(-scores, kth=top_k - 1, axis=-1)[..., :top_k]

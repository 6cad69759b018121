"""Low-rank predictors: x -> rank -> rows, a sigmoid and a threshold (LLM in a flash, 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import PredictorError
from mlx_flash.models.families import Ffn

from .predictor import Predictor, Projection
from .predictor_file import LayerPredictor
from .registry import NONLINEARITIES

FUNCTIONS: dict[str, Callable[[mx.array], mx.array]] = {"none": lambda x: x, "relu": nn.relu}


class LowRank(Predictor):
    """sigmoid(f(x @ first.T) @ second.T + bias) >= threshold.

    Args:
        first: [rank, d_model].
        second: [rows, rank].
        bias: [rows] or None.
        threshold: from 0 to 1, both excluded (tau in the paper).
        nonlinearity: name of f, one of ``NONLINEARITIES``.
    """

    kind = "low-rank"

    def __init__(
        self,
        first: mx.array,
        second: mx.array,
        bias: mx.array | None = None,
        threshold: float = 0.5,
        nonlinearity: str = "none",
    ) -> None:
        if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
            raise PredictorError(
                f"a low-rank predictor of {first.shape} and {second.shape}; expected "
                "[rank, d_model] and [rows, rank]"
            )
        if bias is not None and bias.shape != second.shape[:1]:
            raise PredictorError(f"a bias of {bias.shape} for {second.shape[0]} rows")
        if not 0 < threshold < 1:
            raise PredictorError(f"the threshold of a predictor is between 0 and 1: {threshold}")
        if nonlinearity not in NONLINEARITIES:
            known = ", ".join(NONLINEARITIES)
            raise PredictorError(f"nonlinearity {nonlinearity!r}; expected one of {known}")
        self.first, self.second, self.bias = first, second, bias
        self.threshold, self.nonlinearity = threshold, nonlinearity
        self.nbytes = sum(a.nbytes for a in (first, second, bias) if a is not None)
        self._logit = logit(threshold)

    @property
    def rank(self) -> int:
        """Width between the two matrices."""
        return self.first.shape[0]

    def scores(self, x: mx.array) -> mx.array:
        """What the sigmoid is applied to, [..., rows]."""
        hidden = FUNCTIONS[self.nonlinearity](x.astype(self.first.dtype) @ self.first.T)
        if self.bias is None:
            return hidden @ self.second.T
        return mx.addmm(self.bias, hidden, self.second.T)

    def mask(self, x: mx.array, values: mx.array | None = None) -> mx.array:
        """See ``Predictor``."""
        return self.scores(x) >= self._logit


def logit(threshold: float) -> float:
    """The score at which the sigmoid reaches a threshold: comparing scores needs no sigmoid."""
    return math.log(threshold / (1 - threshold))


def build(layer: LayerPredictor, ffn: Ffn, projection: Projection | None) -> LowRank:
    """One layer's predictor, see ``LayerPredictor.build``."""
    tensors = layer.tensors
    return LowRank(
        tensors["first"],
        tensors["second"],
        tensors.get("bias"),
        layer.threshold,
        layer.nonlinearity,
    )

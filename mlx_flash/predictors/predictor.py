"""Which rows a hidden state needs: low-rank predictors, the exact gate, thresholds.

A predictor looks at the input of an FFN and names the rows to have in memory before the FFN is
computed. ``LowRank`` is that of LLM in a flash (section 3.1): x -> rank -> rows, a sigmoid and a
threshold. ``ResidentPart`` keeps the projection that the activation is applied to (the gate, or up
where there is no gate) in memory and computes it exactly: with a ReLU nothing that fires is missed;
with SwiGLU or GeGLU small activations are dropped, which is lossy.

Knows: what each kind computes. Does not know: files (``predictor_file``), rows on flash, slots, how
predictors are trained (``calibrate``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import PredictorError
from mlx_flash.models.quantized_rows import QuantizedRows, Rows

Function = Callable[[mx.array], mx.array]

# What may stand between the two matrices of a low-rank predictor.
NONLINEARITIES: dict[str, Function] = {"none": lambda x: x, "relu": nn.relu}


@dataclass
class Prediction:
    """What a predictor says of some tokens.

    Args:
        rows: sorted, distinct row numbers, int64 [n]: what at least one of the tokens needs.
        values: where the predictor has computed a projection exactly, its output [..., all rows],
            zero where a token does not need the row; else None.
    """

    rows: np.ndarray
    values: mx.array | None = None


class Predictor(Protocol):
    """Hidden state -> rows.

    Attributes:
        kind: its name for users.
        exact: no row that fires is ever missed, so tokens are those of the dense model.
        provides: the part of a row that ``Prediction.values`` stand for; it need not be read.
        nbytes: memory its weights take.
    """

    kind: str
    exact: bool
    provides: str | None
    nbytes: int

    def __call__(self, x: mx.array) -> Prediction:
        """Predict for x [..., d_model], what the FFN's projections take."""


def union(mask: mx.array) -> np.ndarray:
    """Row numbers that are set for any token of a bool mask [..., rows]; evaluates it."""
    if mask.size > mask.shape[-1]:
        mask = mx.any(mask.reshape(-1, mask.shape[-1]), axis=0)
    return np.flatnonzero(np.array(mask.reshape(-1), copy=False))


class Everything:
    """Every row for every token: a layer that no predictor serves well."""

    kind = "none"
    exact = True
    provides = None
    nbytes = 0

    def __init__(self, rows: int) -> None:
        self._rows = np.arange(rows)

    def __call__(self, x: mx.array) -> Prediction:
        return Prediction(self._rows)


class LowRank:
    """sigmoid(f(x @ first.T) @ second.T + bias) >= threshold.

    Args:
        first: [rank, d_model].
        second: [rows, rank].
        bias: [rows] or None.
        threshold: from 0 to 1, both excluded (tau in the paper).
        nonlinearity: name of f, see ``NONLINEARITIES``.
    """

    kind = "low-rank"
    exact = False
    provides = None

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
        # sigmoid(s) >= tau where s >= logit(tau): no sigmoid is needed.
        self._logit = math.log(threshold / (1 - threshold))

    @property
    def rank(self) -> int:
        """Width between the two matrices."""
        return self.first.shape[0]

    def scores(self, x: mx.array) -> mx.array:
        """What the sigmoid is applied to, [..., rows]."""
        hidden = NONLINEARITIES[self.nonlinearity](x.astype(self.first.dtype) @ self.first.T)
        if self.bias is None:
            return hidden @ self.second.T
        return mx.addmm(self.bias, hidden, self.second.T)

    def __call__(self, x: mx.array) -> Prediction:
        return Prediction(union(self.scores(x) >= self._logit))


class ResidentPart:
    """The gate, or up of an ungated FFN, computed in full from memory.

    A row is needed where ``abs(activation(value)) * scale * other > threshold``; ``other`` is 1, or
    an estimate of the size of what the activation is multiplied by (up's output), from a low-rank
    copy of up and the variance that this copy leaves unexplained:
    ``sqrt((x @ first.T @ second.T)^2 + floor)``.

    Args:
        part: "gate" or "up".
        weight: [rows, d_model], as ``nn.Linear`` holds it, or the same packed.
        bias: [rows] or None.
        activation: what the FFN applies to the projection.
        zeros: whether the activation is zero for a good part of its inputs (the ReLU kinds).
        threshold: not negative. Above zero the predictor is lossy.
        scale: [rows] or None for ones: how much a row adds to the output per unit of activation,
            on average; with an estimate, per unit of activation times estimate.
        estimate: (first [rank, d_model], second [rows, rank], floor [rows]) or None.
    """

    def __init__(
        self,
        part: str,
        weight: Rows,
        bias: mx.array | None,
        activation: Function,
        zeros: bool,
        threshold: float = 0.0,
        scale: mx.array | None = None,
        estimate: tuple[mx.array, mx.array, mx.array] | None = None,
    ) -> None:
        if threshold < 0 or not math.isfinite(threshold):
            raise PredictorError(f"an activation's threshold is not negative: {threshold}")
        self.kind = "threshold" if threshold > 0 or not zeros else part
        self.exact = threshold == 0
        self.provides = part
        self.weight, self.bias, self.scale, self.estimate = weight, bias, scale, estimate
        self.threshold = threshold
        held = (weight, bias, scale, *(estimate or ()))
        self.nbytes = sum(a.nbytes for a in held if a is not None)
        self._activation = activation

    def values(self, x: mx.array) -> mx.array:
        """The projection's output, [..., rows], the same to the bit as the dense model's."""
        if isinstance(self.weight, QuantizedRows):
            y = self.weight.matmul(x, transpose=True)
            return y if self.bias is None else y + self.bias
        if self.bias is None:
            return x @ self.weight.T
        return mx.addmm(self.bias, x, self.weight.T)

    def __call__(self, x: mx.array) -> Prediction:
        values = self.values(x)
        activation = self._activation(values)
        mask = importance(activation, x, self.scale, self.estimate) > self.threshold
        if self.threshold > 0:
            values = mx.where(mask, values, mx.zeros_like(values))
        mx.async_eval(values)
        return Prediction(union(mask), values)


def importance(
    activation: mx.array,
    x: mx.array,
    scale: mx.array | None = None,
    estimate: tuple[mx.array, mx.array, mx.array] | None = None,
) -> mx.array:
    """What ``ResidentPart`` holds against its threshold, [..., rows]; see there."""
    scores = mx.abs(activation)
    if estimate:
        first, second, floor = estimate
        guess = (x.astype(first.dtype) @ first.T) @ second.T
        scores = scores * mx.sqrt(mx.square(guess.astype(mx.float32)) + floor)
    return scores if scale is None else scores * scale

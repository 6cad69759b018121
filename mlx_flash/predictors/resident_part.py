"""Predictors that keep one projection in memory: the exact gate or up, and thresholds.

The projection that the activation is applied to (the gate, or up where there is no gate) is
computed in full. With a ReLU nothing that fires is missed; with SwiGLU or GeGLU small activations
are dropped, which is lossy (CATS, arXiv 2404.08763).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_flash.errors import PredictorError
from mlx_flash.models.families import Ffn, gate_function, has_zeros
from mlx_flash.models.quantized_rows import QuantizedRows, Rows

from .predictor import Prediction, Predictor, Projection, union
from .predictor_file import LayerPredictor


class ResidentPart(Predictor):
    """The gate, or up of an ungated FFN, computed in full from memory.

    A row is needed where ``abs(activation(value)) * scale * other > threshold``; ``other`` is 1, or
    an estimate of the size of what the activation is multiplied by (up's output), from a low-rank
    copy of up and the variance that this copy leaves unexplained:
    ``sqrt((x @ first.T @ second.T)^2 + floor)``.

    Args:
        part: "gate" or "up".
        weight: [rows, d_model], as ``nn.Linear`` holds it, or the same packed; None for a predictor
            that is only asked for ``mask`` with the projection's output at hand.
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
        weight: Rows | None,
        bias: mx.array | None,
        activation: Callable[[mx.array], mx.array],
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
        if self.weight is None:
            raise PredictorError(
                f"this predictor was built without the weights of {self.provides}; give mask the "
                f"output of {self.provides}"
            )
        if isinstance(self.weight, QuantizedRows):
            y = self.weight.matmul(x, transpose=True)
            return y if self.bias is None else y + self.bias
        if self.bias is None:
            return x @ self.weight.T
        return mx.addmm(self.bias, x, self.weight.T)

    def scores(self, x: mx.array, values: mx.array) -> mx.array:
        """What is held against the threshold, [..., rows]."""
        scores = mx.abs(self._activation(values))
        if self.estimate:
            first, second, floor = self.estimate
            guess = (x.astype(first.dtype) @ first.T) @ second.T
            scores = scores * mx.sqrt(mx.square(guess.astype(mx.float32)) + floor)
        return scores if self.scale is None else scores * self.scale

    def mask(self, x: mx.array, values: mx.array | None = None) -> mx.array:
        """See ``Predictor``."""
        return self.scores(x, self.values(x) if values is None else values) > self.threshold

    def __call__(self, x: mx.array) -> Prediction:
        values = self.values(x)
        mask = self.mask(x, values)
        if self.threshold > 0:
            values = mx.where(mask, values, mx.zeros_like(values))
        mx.async_eval(values)
        return Prediction(union(mask), values)


def deciding_part(ffn: Ffn) -> str:
    """The part whose output the activation is applied to."""
    return "gate" if "gate" in ffn.parts else "up"


def build(layer: LayerPredictor, ffn: Ffn, projection: Projection | None) -> ResidentPart:
    """One layer's predictor, see ``LayerPredictor.build``; a threshold of 0 makes it exact."""
    tensors = layer.tensors
    estimate = None
    if "floor" in tensors:
        estimate = (tensors["first"], tensors["second"], tensors["floor"])
    return ResidentPart(
        *(projection or (deciding_part(ffn), None, None)),
        gate_function(ffn),
        has_zeros(ffn),
        layer.threshold,
        tensors.get("scale"),
        estimate,
    )

"""Finds thresholds of what a row is estimated to add to the output.

That is |activation| times |up| times the length of the down column (CATS, arXiv 2404.08763, takes
the activation alone). The activation is known in full; of up a low-rank copy is kept, with the
variance that it leaves open. Where there is no up beside the gate, or it has a bias, what a row
adds per unit of activation is taken on average.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_flash.errors import ModelError
from mlx_flash.models.families import Ffn, gate_function
from mlx_flash.predictors.fitting import Chooser, Figures, Fitted, Fitter, float32
from mlx_flash.predictors.predictor_file import LayerPredictor

BLOCK = 256  # tokens that are multiplied at once


class ThresholdFitter(Fitter):
    """Finds thresholds; the target is the share of the rows that they leave out."""

    @staticmethod
    def refusal(ffn: Ffn) -> str:
        """See ``Fitter``."""
        try:
            gate_function(ffn)
        except ModelError as error:
            return f"no threshold can be set for this model: {error}"
        return ""

    def fit(self, layer: int, target: float) -> Fitted:
        """The scale of a layer's rows, and the copy of up; the same for every sparsity."""
        weights = self.data.weights(layer)
        norms = np.linalg.norm(weights["down"], axis=1).astype(np.float32)
        arrays = {"norms": norms, "scale": average_scale(self.data.mean_squares[layer], norms)}
        if self._estimates(layer):
            arrays |= self._estimate(layer, weights["up"], norms) | {"scale": norms}
        return Fitted(arrays, {})

    def _estimates(self, layer: int) -> bool:
        gated = "gate" in self.data.ffn.parts and not self.data.ffn.up_activation
        return gated and f"{layer}.up" not in self.data.biases

    def _estimate(self, layer: int, up: np.ndarray, norms: np.ndarray) -> dict[str, np.ndarray]:
        data, square = self.data.part(layer, "train"), 0.0
        for at in range(0, data.tokens, BLOCK):
            x = float32(data.floats("x", slice(at, at + BLOCK)))
            square = square + (x.T @ x).astype(np.float64)
        activation = gate_function(self.data.ffn)
        gate = self.data.part(layer, "validation").floats("gate")
        care = norms * np.sqrt(np.square(float32(activation(gate))).mean(axis=0))
        found = low_rank_copy(up, square / data.tokens, care + 1e-12, self.rank())
        return dict(zip(("first", "second", "floor"), found, strict=True))

    def rank(self) -> int:
        """Of the copy of up: an eighth of the width, where nothing else is asked for."""
        if self.data.settings.rank != "auto":
            return int(self.data.settings.rank)
        return min(self.data.d_model, max(8, 8 * round(self.data.d_model / 64)))

    def _tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
        """What is stored: the copy in the model's float type, the rest in float32."""
        kept = {name: mx.array(array) for name, array in arrays.items() if name != "norms"}
        for name in {"first", "second"} & kept.keys():
            kept[name] = kept[name].astype(self.data.dtype)
        return kept

    def settle(self, layer: int, fitted: Fitted, target: float) -> tuple[LayerPredictor, Figures]:
        """See ``Fitter``."""
        tensors = self._tensors(fitted.arrays)
        scores = self._scores(layer, tensors)
        threshold = quantile(scores, target)
        predictor = LayerPredictor("threshold", threshold, tensors=tensors)
        strength = self.data.strength(layer, fitted.arrays["norms"])
        return predictor, self.data.figures(predictor, scores > np.float32(threshold), strength)

    def alternatives(self, layer: int, fitted: Fitted, target: float) -> dict[str, Chooser]:
        """The same sparsity by other scores: the bare activation, and what a row really adds."""
        norms = fitted.arrays["norms"]
        scales = {"activation": np.ones_like(norms)}
        if "floor" in fitted.arrays:
            scales["scaled"] = average_scale(self.data.mean_squares[layer], norms)
        found: dict[str, Chooser] = {}
        for name, scale in scales.items():
            tensors = {"scale": mx.array(scale)}
            threshold = quantile(self._scores(layer, tensors), target)
            found[name] = LayerPredictor("threshold", threshold, tensors=tensors)
        least, lengths = quantile(self.data.strength(layer, norms), target), mx.array(norms)
        found["product"] = lambda seen: mx.abs(seen.h.astype(mx.float32)) * lengths > least
        return found

    def held_bytes(self, rows: int) -> int:
        """See ``Fitter``."""
        return self.rank() * (self.data.d_model + rows) * (4 + self.data.dtype.size) + 8 * rows

    def fit_bytes(self, rows: int, validation: int) -> int:
        """See ``Fitter``."""
        weights = 5 * self.data.weight_bytes(rows)
        return weights + 5 * self.data.d_model**2 * 8 + 48 * validation * rows

    def _scores(self, layer: int, tensors: dict[str, mx.array]) -> np.ndarray:
        data = self.data.part(layer, "validation")
        gate, x = data.floats("gate"), data.floats("x")
        predictor = LayerPredictor("threshold", tensors=tensors).build(self.data.ffn, gate.shape[1])
        return float32(predictor.scores(x, gate))


def quantile(scores: np.ndarray, sparsity: float) -> float:
    """The smallest score that at least a share ``sparsity`` of ``scores`` does not exceed."""
    flat = scores.reshape(-1)
    index = min(max(math.ceil(sparsity * flat.size) - 1, 0), flat.size - 1)
    return float(np.partition(flat, index)[index])


def low_rank_copy(
    weight: np.ndarray, second_moment: np.ndarray, care: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The projection of a rank that is closest on inputs of a second moment.

    Args:
        weight: [rows, d_model].
        second_moment: mean of x x^T, [d_model, d_model].
        care: how much the error of each row counts, [rows].
        rank: of the copy.

    Returns:
        (first [rank, d_model], second [rows, rank], floor [rows]): weight @ x is near
        second @ first @ x, with a mean square error of floor.
    """
    d_model = weight.shape[1]
    ridge = 1e-4 * max(float(np.trace(second_moment)) / d_model, 1e-30)
    factor = np.linalg.cholesky(second_moment + ridge * np.eye(d_model))
    turned = weight @ factor.astype(np.float32)
    weighed = turned * care[:, None]
    _, vectors = np.linalg.eigh((weighed.T @ weighed).astype(np.float64))
    vectors = np.ascontiguousarray(vectors[:, ::-1][:, :rank])
    first = np.linalg.solve(factor.T, vectors).T.astype(np.float32)
    second = turned @ vectors.astype(np.float32)
    floor = np.square(turned).sum(axis=1) - np.square(second).sum(axis=1)
    return np.ascontiguousarray(first), second, np.maximum(floor, 0).astype(np.float32)


def average_scale(mean_square: np.ndarray | None, down_norms: np.ndarray) -> np.ndarray:
    """What a row adds to the output per unit of activation, float32 [rows]."""
    up = 1.0 if mean_square is None else np.sqrt(mean_square)
    return np.asarray(up * down_norms, np.float32)

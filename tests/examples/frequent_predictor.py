"""A kind of predictor in one file: the rows that fire most often, whatever the token.

CONTRIBUTING.md shows this file. In the package it would be ``predictors/frequent.py``, with the
entry below in ``KINDS`` of ``predictors/registry.py`` and "mlx_flash.predictors.frequent" for
"examples.frequent_predictor".
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_flash.models.families import Ffn, has_zeros
from mlx_flash.predictors.fitting import Figures, Fitted, Fitter
from mlx_flash.predictors.predictor import Predictor, Projection
from mlx_flash.predictors.predictor_file import LayerPredictor
from mlx_flash.predictors.registry import PredictorKind, Training

ENTRY = PredictorKind(
    "frequent",
    "examples.frequent_predictor:build",
    training=Training(
        tensors={"rate": ("rows",)},
        needed=("rate",),
        fitter="examples.frequent_predictor:FrequentFitter",
        records={"train": ("active",), "validation": ("h",)},
        target="target_recall",
        options="--kind frequent",
    ),
)


class Frequent(Predictor):
    """Names the rows that fired for at least a share ``threshold`` of the tokens.

    Args:
        rate: share of the tokens of the calibration text that each row fired for, [rows].
    """

    kind = "frequent"

    def __init__(self, rate: mx.array, threshold: float) -> None:
        self.rate, self.threshold, self.nbytes = rate, threshold, rate.nbytes

    def mask(self, x: mx.array, values: mx.array | None = None) -> mx.array:
        """See ``Predictor``."""
        return mx.broadcast_to(self.rate >= self.threshold, (*x.shape[:-1], self.rate.size))


def build(layer: LayerPredictor, ffn: Ffn, projection: Projection | None) -> Frequent:
    """One layer's predictor, see ``LayerPredictor.build``."""
    return Frequent(layer.tensors["rate"], layer.threshold)


class FrequentFitter(Fitter):
    """Counts; the target is a share of the active entries of the training text."""

    @staticmethod
    def refusal(ffn: Ffn) -> str:
        """See ``Fitter``."""
        return "" if has_zeros(ffn) else f"with {ffn.activation} every row fires for every token"

    def fit(self, layer: int, target: float) -> Fitted:
        """See ``Fitter``."""
        rate = self.data.part(layer, "train").active().mean(axis=0, dtype=np.float32)
        norms = np.linalg.norm(self.data.weights(layer)["down"], axis=1)
        return Fitted({"rate": rate, "norms": norms}, {})

    def settle(self, layer: int, fitted: Fitted, target: float) -> tuple[LayerPredictor, Figures]:
        """See ``Fitter``."""
        rate = fitted.arrays["rate"]
        falling = np.sort(rate)[::-1]
        enough = int(np.searchsorted(np.cumsum(falling), target * falling.sum()))
        threshold = float(falling[min(enough, rate.size - 1)])
        predictor = LayerPredictor("frequent", threshold, tensors={"rate": mx.array(rate)})
        strength = self.data.strength(layer, fitted.arrays["norms"])
        predicted = np.broadcast_to(rate >= threshold, strength.shape)
        return predictor, self.data.figures(predictor, predicted, strength)

    def fit_bytes(self, rows: int, validation: int) -> int:
        """See ``Fitter``."""
        return 4 * self.data.weight_bytes(rows) + 20 * validation * rows

    def held_bytes(self, rows: int) -> int:
        """See ``Fitter``."""
        return 12 * rows

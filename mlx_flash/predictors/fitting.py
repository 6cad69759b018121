"""What calibration asks of a kind that it can fit, and what it gives it to fit from.

``calibrate`` records what the FFNs do on a text, then asks the kind's ``Fitter`` for each layer's
predictor, and chooses between what comes out by the perplexity that it costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_flash.models.families import Ffn

from .predictor_file import LayerPredictor

Figures = dict[str, Any]  # of one layer, for the report
# A predictor, or a function from what an FFN computed (``calibration.probes.Seen``) to a mask.
Chooser = LayerPredictor | Callable[[Any], mx.array]


@dataclass
class Fitted:
    """A layer's predictor before its threshold is chosen.

    Args:
        arrays: whatever the fitter needs to go on, float32; kept on disk against interruptions.
        figures: for the report, in addition to those of ``TrainingData.figures``.
    """

    arrays: dict[str, np.ndarray]
    figures: Figures


class Recorded(Protocol):
    """What was recorded of one layer on one part of the text; read when asked for.

    Attributes:
        tokens: how many were recorded.
    """

    tokens: int

    def floats(self, what: str, index: Any = slice(None)) -> mx.array:
        """ "x" [n, d_model], "h" or "gate" [n, rows] of some tokens, in the model's float type."""

    def active(self, index: Any = slice(None)) -> np.ndarray:
        """Which rows were active, bool [n, rows]."""


class FitSettings(Protocol):
    """What the user asked for, as far as fitters care.

    Attributes:
        rank: width between low-rank matrices, or "auto".
        nonlinearity: between low-rank matrices, one of ``registry.NONLINEARITIES``.
        seed: of what is chosen by chance.
    """

    rank: int | str
    nonlinearity: str
    seed: int


class TrainingData(Protocol):
    """One model, what was recorded of it, and what is asked for.

    Attributes:
        ffn: of the model's family.
        d_model: width of an FFN's input.
        dtype: the model's float type.
        settings: what is asked for.
        biases: "{layer}.{part}" -> float32 [rows], of gates and ups that have one.
        mean_squares: of each layer, mean square of up's output [rows]; None where that was not
            recorded or there is no up beside the gate.
    """

    ffn: Ffn
    d_model: int
    dtype: mx.Dtype
    settings: FitSettings
    biases: dict[str, np.ndarray]
    mean_squares: list[np.ndarray | None]

    def part(self, layer: int, name: str) -> Recorded:
        """What was recorded of a layer on "train" or "validation"."""

    def weights(self, layer: int) -> dict[str, np.ndarray]:
        """Gate, up and down by their names, float32 [rows, d_model] each."""

    def weight_bytes(self, rows: int) -> int:
        """Memory that ``weights`` of a layer of ``rows`` rows take at most."""

    def strength(self, layer: int, norms: np.ndarray) -> np.ndarray:
        """Norm of what each row adds to the output on the validation text, [tokens, rows].

        Args:
            norms: of the rows' down columns, [rows].
        """

    def figures(
        self, predictor: LayerPredictor, predicted: np.ndarray, strength: np.ndarray
    ) -> Figures:
        """What a predictor does on the validation text; sets its demand.

        A predictor that names too many rows is turned into one of kind "none", where rows of the
        kind can be read whole.

        Args:
            predicted: bool [tokens, rows].
            strength: from ``strength``.
        """


class Fitter(ABC):
    """Fits the layers of one model, one at a time.

    Args:
        data: what there is to fit from.

    Attributes:
        refits: whether a layer is fitted anew when its target is raised; else its threshold is
            chosen anew only.
    """

    refits = False

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    @staticmethod
    def refusal(ffn: Ffn) -> str:
        """Why a family's FFNs have no such predictors; empty where they have."""
        return ""

    @abstractmethod
    def fit(self, layer: int, target: float) -> Fitted:
        """Fit one layer for a target, see ``registry.Training.target``."""

    @abstractmethod
    def settle(self, layer: int, fitted: Fitted, target: float) -> tuple[LayerPredictor, Figures]:
        """The predictor with the threshold that reaches a target, and what it does."""

    @abstractmethod
    def fit_bytes(self, rows: int, validation: int) -> int:
        """Memory that fitting a layer takes at most.

        Args:
            rows: of the layer.
            validation: number of tokens of the validation text.
        """

    @abstractmethod
    def held_bytes(self, rows: int) -> int:
        """Memory of a fitted layer, in float32 and in the model's type."""

    def alternatives(self, layer: int, fitted: Fitted, target: float) -> dict[str, Chooser]:
        """Other ways to choose the same number of rows, by name, for the report to compare."""
        return {}


def float32(array: mx.array) -> np.ndarray:
    """An array of any float type as numpy's float32."""
    return np.array(array.astype(mx.float32))

"""What a fitter is given: recordings of one layer, its weights, figures of a predictor on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flash.calibration.recordings import Part
from mlx_flash.calibration.settings import Settings
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.quantized_rows import QuantizedRows
from mlx_flash.paging.row_weights import resident_part
from mlx_flash.predictors import registry
from mlx_flash.predictors.fitting import Figures, float32
from mlx_flash.predictors.predictor_file import LayerPredictor
from mlx_flash.storage.reader import RowReader

from . import activity

WINDOW = 4  # tokens that rows are held for, where a report gives one figure for what is read
WORTHWHILE = 0.5  # of the rows: a predictor that names more is left out, the layer is read whole


@dataclass
class RecordedModel:
    """``fitting.TrainingData`` from a model directory and its recordings.

    Args:
        directory: the model's.
        reader: of its rows.
        work: working directory with the recordings.
        settings, biases, mean_squares: see ``TrainingData``.
    """

    directory: ModelDirectory
    reader: RowReader
    work: Path
    settings: Settings
    biases: dict[str, np.ndarray]
    mean_squares: list[np.ndarray | None]

    def __post_init__(self) -> None:
        self.ffn, self.d_model = self.directory.ffn, self.directory.d_model
        self.dtype = self.directory.dtype

    def part(self, layer: int, name: str) -> Part:
        """See ``TrainingData``."""
        rows = self.directory.rows.layers[layer].rows
        return Part(self.work, layer, name, rows, self.d_model, self.dtype)

    def weights(self, layer: int) -> dict[str, np.ndarray]:
        """See ``TrainingData``."""
        found = {}
        for part in self.ffn.parts:
            rows = resident_part(self.reader, layer, part, self.directory.scheme)
            found[part] = float32(
                rows.floats(mx.float32) if isinstance(rows, QuantizedRows) else rows
            )
        return found

    def weight_bytes(self, rows: int) -> int:
        """See ``TrainingData``."""
        return 4 * len(self.directory.rows.layout.parts) * rows * self.d_model

    def strength(self, layer: int, norms: np.ndarray) -> np.ndarray:
        """See ``TrainingData``."""
        return np.abs(float32(self.part(layer, "validation").floats("h"))) * norms

    def figures(
        self, predictor: LayerPredictor, predicted: np.ndarray, strength: np.ndarray
    ) -> Figures:
        """See ``TrainingData``."""
        rows, stride = predicted.shape[1], self.directory.rows.layout.stride
        active = strength > 0
        if predicted.mean() > WORTHWHILE and _may_be_whole(predictor):
            predictor.kind, predictor.tensors = registry.WHOLE, {}
        if predictor.whole:
            predicted = np.ones_like(predicted)
        predictor.demand = activity.union_sizes(predicted)
        fresh = activity.fresh_rows(predicted)
        return {
            "kind": predictor.kind,
            "rows": rows,
            "rank": predictor.rank,
            "threshold": predictor.threshold,
            "nonlinearity": predictor.nonlinearity,
            **activity.compare(predicted, active, strength),
            "predictor_bytes": predictor.nbytes,
            "fresh": fresh,
            "fresh_active": activity.fresh_rows(active),
            "demand": predictor.demand,
            "bytes_per_token": (rows if predictor.whole else fresh[str(WINDOW)]) * stride,
            "cache_bytes": 0 if predictor.whole else predictor.demand[str(WINDOW)] * stride,
        }


def _may_be_whole(predictor: LayerPredictor) -> bool:
    """A resident part is left out of all slots, so no layer can do without its predictor."""
    return not predictor.whole and not registry.KINDS[predictor.kind].resident

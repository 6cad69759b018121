"""One layer's predictor, from what was recorded of it: fitted, its rank and threshold chosen.

A rank is chosen by what the end costs: bytes of rows read afresh per token at window 4 on the
validation text, and a price for memory: that of the predictor and of the rows that such a window
holds (a predictor that names half the rows reads next to nothing afresh). At every rank the
threshold is the one that reaches the recall asked for.

Knows: one layer at a time, its recordings, its weights in the row file. Does not know: the model
as a whole, perplexity. LLM in a flash, section 3.1; CATS (2404.08763) for thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.calibration.probes import Seen
from mlx_flash.calibration.recordings import Part
from mlx_flash.calibration.settings import Settings
from mlx_flash.errors import CalibrationError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.models.families import Ffn
from mlx_flash.models.quantized_rows import QuantizedRows
from mlx_flash.paging.row_weights import resident_part
from mlx_flash.predictors.low_rank import LowRank, logit
from mlx_flash.predictors.predictor_file import LayerPredictor
from mlx_flash.storage.reader import RowReader

from . import activity, low_rank_fit

WINDOW = 4
# What a byte of memory costs in bytes read per token. It is computed from for every token, some
# sixteen times as fast as flash is read (100 against 6 GB/s on an M1), and it is one that no other
# row can have, which saves about as much: a row stays unread for some sixteen tokens.
MEMORY_COST = 1 / 8
HOPELESS = 1.25  # times the least cost of a closed form: not worth training
WORTHWHILE = 0.5  # of the rows: a predictor that names more is left out, the layer is read whole
SHOWN = ("kind", "recall", "predicted_per_active", "bytes_per_token", "predictor_bytes")
SHOWN += ("cache_bytes",)  # of a candidate, in the report
BLOCK = 256  # tokens whose scores are computed at once
Mask = Callable[[Seen], mx.array]


@dataclass
class Fitted:
    """A layer's predictor before its threshold: arrays in float32, figures for the report."""

    arrays: dict[str, np.ndarray]
    figures: dict[str, Any]


def mask_of(layer: LayerPredictor, ffn: Ffn) -> Mask | None:
    """Which rows a predictor names for each token, the same that paging would read; None for all"""
    if layer.whole:
        return None
    predictor = layer.build(ffn, 0)
    return lambda seen: predictor.mask(seen.x, seen.gate)


class _Layers:
    """What both kinds share.

    Args:
        directory: the model's.
        reader: of its rows.
        work: working directory with the recordings.
        settings: what is asked for.
    """

    def __init__(
        self, directory: ModelDirectory, reader: RowReader, work: Path, settings: Settings
    ) -> None:
        self.directory, self.reader, self.work, self.settings = directory, reader, work, settings
        self.ffn = directory.ffn
        self.layout = directory.rows.layout
        self.d_model = directory.d_model
        self.dtype = directory.dtype

    def part(self, layer: int, name: str) -> Part:
        """What was recorded of a layer."""
        rows = self.directory.rows.layers[layer].rows
        return Part(self.work, layer, name, rows, self.d_model, self.dtype)

    def weights(self, layer: int) -> dict[str, np.ndarray]:
        """gate, up and down in float32, [rows, d_model] each, as rows are."""
        found = {}
        for part in self.ffn.parts:
            rows = resident_part(self.reader, layer, part, self.directory.scheme)
            found[part] = _float32(
                rows.floats(mx.float32) if isinstance(rows, QuantizedRows) else rows
            )
        return found

    def strength(self, layer: int, norms: np.ndarray) -> np.ndarray:
        """What each row adds to the output at each token of the validation text, its norm."""
        h = self.part(layer, "validation").floats("h")
        return np.abs(_float32(h)) * norms

    def figures(
        self, predictor: LayerPredictor, predicted: np.ndarray, strength: np.ndarray
    ) -> dict[str, Any]:
        """What a predictor does on the validation text; sets its demand."""
        rows, stride = predicted.shape[1], self.layout.stride
        active = strength > 0
        if predictor.kind != "none" and predicted.mean() > WORTHWHILE and self._may_leave_out:
            predictor.kind, predictor.tensors = "none", {}
        if predictor.kind == "none":
            predicted = np.ones_like(predicted)
        predictor.demand = activity.union_sizes(predicted)
        fresh = activity.fresh_rows(predicted)
        whole = predictor.kind == "none"
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
            "bytes_per_token": (rows if whole else fresh[str(WINDOW)]) * stride,
            "cache_bytes": 0 if whole else predictor.demand[str(WINDOW)] * stride,
        }

    _may_leave_out = True


class LowRankLayers(_Layers):
    """Fits low-rank predictors."""

    def __init__(self, *args: Any, biases: dict[str, np.ndarray]) -> None:
        super().__init__(*args)
        self.biases = biases

    def fit(self, layer: int, target: float) -> Fitted:
        """Fit one layer at the rank asked for, or at the one that costs least at this recall."""
        data = self.part(layer, "train")
        tokens = data.tokens
        weights = self.weights(layer)
        norms = np.linalg.norm(weights["down"], axis=1).astype(np.float32)
        deciding = self._deciding()

        def batches(index: np.ndarray) -> low_rank_fit.Batch:
            return _float32(data.floats("x", index)), data.active(index)

        ranks = self.ranks()
        closed = low_rank_fit.ClosedForm(
            [weights[part] for part in deciding],
            [self.biases.get(f"{layer}.{part}") for part in deciding],
            self.ffn.threshold if self.ffn.activation == "fatrelu" else 0.0,
            low_rank_fit.moments(batches, tokens),
            max(ranks),
        )
        del weights
        strength = self.strength(layer, norms)
        starts = [closed.cut(rank, self.settings.nonlinearity) for rank in ranks]
        tried = [self._rounded(layer, start, target, strength, False) for start in starts]
        least = min(found.figures["cost"] for found in tried)
        for start, found in zip(starts, list(tried), strict=True):
            if found.figures["cost"] <= HOPELESS * least or len(ranks) == 1:
                end = self._trained(layer, start, batches, tokens)
                tried.append(self._rounded(layer, end, target, strength, True))
        best = min(tried, key=lambda found: found.figures["cost"])
        candidates = sorted((found.figures for found in tried), key=lambda f: f["rank"])
        names = ("rank", "trained", "cost")
        figures = {name: best.figures[name] for name in names} | {"candidates": candidates}
        return Fitted(best.arrays | {"norms": norms}, figures)

    def _trained(
        self, layer: int, start: low_rank_fit.Matrices, batches: low_rank_fit.Batches, tokens: int
    ) -> low_rank_fit.Matrices:
        seed, nonlinearity = [self.settings.seed, layer, start.rank], self.settings.nonlinearity
        try:
            return low_rank_fit.train(start, batches, tokens, seed=seed, nonlinearity=nonlinearity)
        except CalibrationError as error:
            raise CalibrationError(
                f"training the predictor of layer {layer} at rank {start.rank} broke off: {error}; "
                "nothing was written; try another --rank or more --tokens"
            ) from error

    def _rounded(
        self,
        layer: int,
        found: low_rank_fit.Matrices,
        target: float,
        strength: np.ndarray,
        trained: bool,
    ) -> Fitted:
        """In the model's float type, which is what is stored and so what is measured."""
        arrays = {"first": found.first, "second": found.second, "bias": found.bias}
        arrays = {name: _float32(mx.array(a).astype(self.dtype)) for name, a in arrays.items()}
        _, figures = self._settled(layer, arrays, target, strength)
        memory = figures["predictor_bytes"] + figures["cache_bytes"]
        cost = figures["bytes_per_token"] + MEMORY_COST * memory
        shown = {name: figures[name] for name in SHOWN}
        return Fitted(arrays, {"rank": found.rank, "trained": trained, "cost": cost, **shown})

    def settle(self, layer: int, fitted: Fitted, target: float) -> tuple[LayerPredictor, dict]:
        """The predictor with the threshold that reaches a recall; and what it does."""
        strength = self.strength(layer, fitted.arrays["norms"])
        return self._settled(layer, fitted.arrays, target, strength)

    def _settled(
        self, layer: int, arrays: dict[str, np.ndarray], target: float, strength: np.ndarray
    ) -> tuple[LayerPredictor, dict[str, Any]]:
        tensors = {
            name: mx.array(arrays[name]).astype(self.dtype) for name in ("first", "second", "bias")
        }
        nonlinearity = self.settings.nonlinearity
        low_rank = LowRank(**tensors, nonlinearity=nonlinearity)
        x = self.part(layer, "validation").floats("x")
        scores = np.concatenate(
            [_float32(low_rank.scores(x[at : at + BLOCK])) for at in range(0, len(x), BLOCK)]
        )
        active = strength > 0
        found = scores[active]
        cut = min(
            low_rank_fit.cutoff(found, target),
            low_rank_fit.weighted_cutoff(found, strength[active], target),
        )
        threshold = low_rank_fit.sigmoid(cut)
        predictor = LayerPredictor("low-rank", threshold, nonlinearity, tensors)
        predicted = np.array(mx.array(scores) >= logit(threshold))
        return predictor, self.figures(predictor, predicted, strength)

    def ranks(self) -> Sequence[int]:
        """Ranks to try, smallest first."""
        if self.settings.rank != "auto":
            return (int(self.settings.rank),)
        parts = (self.d_model / n for n in (32, 16, 8, 4, 2))
        return sorted({min(self.d_model, max(8, 8 * round(part / 8))) for part in parts})

    def held_bytes(self, rows: int) -> int:
        """Memory of a fitted layer of middling rank, in float32 and in the model's type."""
        ranks = self.ranks()
        middle = ranks[len(ranks) // 2]
        return middle * (self.d_model + rows) * (4 + self.dtype.size)

    def fit_bytes(self, rows: int, validation: int) -> int:
        """Memory that fitting a layer takes, from above."""
        weights = 4 * len(self.layout.parts) * rows * self.d_model * 4
        square = 5 * self.d_model**2 * 8
        training = 6 * max(self.ranks()) * (self.d_model + rows) * 4
        return (
            weights + square + training + 7 * low_rank_fit.BATCH * rows * 4 + 20 * validation * rows
        )

    def _deciding(self) -> tuple[str, ...]:
        if "gate" not in self.ffn.parts:
            return ("up",)
        return ("gate", "up") if self.ffn.up_activation else ("gate",)


class ThresholdLayers(_Layers):
    """Finds thresholds of what a row is estimated to add to the output.

    That is |activation| times |up| times the length of the down column. The activation is known in
    full; of up a low-rank copy is kept, with the variance that it leaves open. Where there is no up
    beside the gate, or it has a bias, what a row adds per unit of activation is taken on average.
    """

    _may_leave_out = False

    def __init__(
        self,
        *args: Any,
        mean_squares: list[np.ndarray | None],
        biases: dict[str, np.ndarray],
    ) -> None:
        super().__init__(*args)
        self.mean_squares = mean_squares
        self.biases = biases

    def fit(self, layer: int, target: float) -> Fitted:
        """The scale of a layer's rows, and the copy of up; the same for every sparsity."""
        weights = self.weights(layer)
        norms = np.linalg.norm(weights["down"], axis=1).astype(np.float32)
        arrays = {"norms": norms, "scale": low_rank_fit.scale(self.mean_squares[layer], norms)}
        if self._estimates(layer):
            arrays |= self._estimate(layer, weights["up"], norms) | {"scale": norms}
        return Fitted(arrays, {})

    def _estimates(self, layer: int) -> bool:
        gated = "gate" in self.ffn.parts and not self.ffn.up_activation
        return gated and f"{layer}.up" not in self.biases

    def _estimate(self, layer: int, up: np.ndarray, norms: np.ndarray) -> dict[str, np.ndarray]:
        data, square = self.part(layer, "train"), 0.0
        for at in range(0, data.tokens, BLOCK):
            x = _float32(data.floats("x", slice(at, at + BLOCK)))
            square = square + (x.T @ x).astype(np.float64)
        activation = families.gate_function(self.ffn)
        gate = self.part(layer, "validation").floats("gate")
        care = norms * np.sqrt(np.square(_float32(activation(gate))).mean(axis=0))
        found = low_rank_fit.low_rank_copy(up, square / data.tokens, care + 1e-12, self.rank())
        return dict(zip(("first", "second", "floor"), found, strict=True))

    def rank(self) -> int:
        """Of the copy of up: an eighth of the width, where nothing else is asked for."""
        if self.settings.rank != "auto":
            return int(self.settings.rank)
        return min(self.d_model, max(8, 8 * round(self.d_model / 64)))

    def _tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
        """What is stored: the copy in the model's float type, the rest in float32."""
        kept = {name: mx.array(array) for name, array in arrays.items() if name != "norms"}
        for name in {"first", "second"} & kept.keys():
            kept[name] = kept[name].astype(self.dtype)
        return kept

    def settle(self, layer: int, fitted: Fitted, sparsity: float) -> tuple[LayerPredictor, dict]:
        """The predictor that leaves a share of the rows out; and what it does."""
        tensors = self._tensors(fitted.arrays)
        scores = self._scores(layer, tensors)
        threshold = low_rank_fit.quantile(scores, sparsity)
        predictor = LayerPredictor("threshold", threshold, tensors=tensors)
        strength = self.strength(layer, fitted.arrays["norms"])
        return predictor, self.figures(predictor, scores > np.float32(threshold), strength)

    def other_masks(self, layer: int, fitted: Fitted, sparsity: float) -> dict[str, Mask]:
        """The same sparsity by other scores: the bare activation, and what a row really adds."""
        norms = fitted.arrays["norms"]
        scales = {"activation": np.ones_like(norms)}
        if "floor" in fitted.arrays:
            scales["scaled"] = low_rank_fit.scale(self.mean_squares[layer], norms)
        masks = {}
        for name, scale in scales.items():
            tensors = {"scale": mx.array(scale)}
            threshold = low_rank_fit.quantile(self._scores(layer, tensors), sparsity)
            other = LayerPredictor("threshold", threshold, tensors=tensors)
            masks[name] = mask_of(other, self.ffn)
        least, lengths = (
            low_rank_fit.quantile(self.strength(layer, norms), sparsity),
            mx.array(norms),
        )
        masks["product"] = lambda seen: mx.abs(seen.h.astype(mx.float32)) * lengths > least
        return masks

    def held_bytes(self, rows: int) -> int:
        """Memory of a fitted layer, in float32 and in the model's type, from above."""
        return self.rank() * (self.d_model + rows) * (4 + self.dtype.size) + 8 * rows

    def fit_bytes(self, rows: int, validation: int) -> int:
        """Memory that fitting a layer takes, from above."""
        weights = 5 * len(self.layout.parts) * rows * self.d_model * 4
        return weights + 5 * self.d_model**2 * 8 + 48 * validation * rows

    def _scores(self, layer: int, tensors: dict[str, mx.array]) -> np.ndarray:
        data = self.part(layer, "validation")
        gate, x = data.floats("gate"), data.floats("x")
        predictor = LayerPredictor("threshold", tensors=tensors).build(self.ffn, gate.shape[1])
        return _float32(predictor.scores(x, gate))


def _float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))

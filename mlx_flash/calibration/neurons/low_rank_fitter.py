"""Fits low-rank predictors; ranks and thresholds are chosen by what they cost.

The cost of a rank is the bytes of rows read afresh per token at window 4 on the validation text,
and a price for memory: that of the predictor and of the rows that such a window holds (a predictor
that names half the rows reads next to nothing afresh). At every rank the threshold is the one that
reaches the recall asked for. LLM in a flash, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_flash.errors import CalibrationError
from mlx_flash.models.families import Ffn, has_zeros
from mlx_flash.predictors.fitting import Figures, Fitted, Fitter, float32
from mlx_flash.predictors.low_rank import LowRank, logit
from mlx_flash.predictors.predictor_file import LayerPredictor

from . import low_rank_fit

# What a byte of memory costs in bytes read per token. Memory is read for every token, some sixteen
# times as fast as flash (100 against 6 GB/s on an M1), and a byte of it holds no other row, which
# would save about as much: a row stays unread for some sixteen tokens.
MEMORY_COST = 1 / 8
HOPELESS = 1.25  # times the least cost of a closed form: not worth training
SHOWN = ("kind", "recall", "predicted_per_active", "bytes_per_token", "predictor_bytes")
SHOWN += ("cache_bytes",)  # of a candidate, in the report
BLOCK = 256  # tokens whose scores are computed at once


class LowRankFitter(Fitter):
    """Fits low-rank predictors; the target is a recall."""

    @staticmethod
    def refusal(ffn: Ffn) -> str:
        """See ``Fitter``."""
        if has_zeros(ffn):
            return ""
        return (
            f"the activation of this model, {ffn.activation}, has no zeros to predict: every row "
            "counts for every token; --kind threshold would leave the small ones out, at a loss"
        )

    @property
    def refits(self) -> bool:
        """The cheapest rank at one recall may name most of the rows at another."""
        return len(self.ranks()) > 1

    def fit(self, layer: int, target: float) -> Fitted:
        """Fit one layer at the rank asked for, or at the one that costs least at this recall."""
        data, ffn = self.data, self.data.ffn
        recorded = data.part(layer, "train")
        tokens = recorded.tokens
        weights = data.weights(layer)
        norms = np.linalg.norm(weights["down"], axis=1).astype(np.float32)
        deciding = self._deciding()

        def batches(index: np.ndarray) -> low_rank_fit.Batch:
            return float32(recorded.floats("x", index)), recorded.active(index)

        ranks = self.ranks()
        closed = low_rank_fit.ClosedForm(
            [weights[part] for part in deciding],
            [data.biases.get(f"{layer}.{part}") for part in deciding],
            ffn.threshold if ffn.activation == "fatrelu" else 0.0,
            low_rank_fit.moments(batches, tokens),
            max(ranks),
        )
        del weights
        strength = data.strength(layer, norms)
        starts = [closed.cut(rank, data.settings.nonlinearity) for rank in ranks]
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
        settings = self.data.settings
        seed, nonlinearity = [settings.seed, layer, start.rank], settings.nonlinearity
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
        arrays = {n: float32(mx.array(a).astype(self.data.dtype)) for n, a in arrays.items()}
        _, figures = self._settled(layer, arrays, target, strength)
        memory = figures["predictor_bytes"] + figures["cache_bytes"]
        cost = figures["bytes_per_token"] + MEMORY_COST * memory
        shown = {name: figures[name] for name in SHOWN}
        return Fitted(arrays, {"rank": found.rank, "trained": trained, "cost": cost, **shown})

    def settle(self, layer: int, fitted: Fitted, target: float) -> tuple[LayerPredictor, Figures]:
        """See ``Fitter``."""
        strength = self.data.strength(layer, fitted.arrays["norms"])
        return self._settled(layer, fitted.arrays, target, strength)

    def _settled(
        self, layer: int, arrays: dict[str, np.ndarray], target: float, strength: np.ndarray
    ) -> tuple[LayerPredictor, Figures]:
        dtype, nonlinearity = self.data.dtype, self.data.settings.nonlinearity
        tensors = {n: mx.array(arrays[n]).astype(dtype) for n in ("first", "second", "bias")}
        low_rank = LowRank(**tensors, nonlinearity=nonlinearity)
        x = self.data.part(layer, "validation").floats("x")
        scores = np.concatenate(
            [float32(low_rank.scores(x[at : at + BLOCK])) for at in range(0, len(x), BLOCK)]
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
        return predictor, self.data.figures(predictor, predicted, strength)

    def ranks(self) -> Sequence[int]:
        """Ranks to try, smallest first."""
        if self.data.settings.rank != "auto":
            return (int(self.data.settings.rank),)
        width = self.data.d_model
        parts = (width / n for n in (32, 16, 8, 4, 2))
        return sorted({min(width, max(8, 8 * round(part / 8))) for part in parts})

    def held_bytes(self, rows: int) -> int:
        """See ``Fitter``; of middling rank."""
        ranks = self.ranks()
        middle = ranks[len(ranks) // 2]
        return middle * (self.data.d_model + rows) * (4 + self.data.dtype.size)

    def fit_bytes(self, rows: int, validation: int) -> int:
        """See ``Fitter``."""
        width = self.data.d_model
        weights = 4 * self.data.weight_bytes(rows)
        square = 5 * width**2 * 8
        training = 6 * max(self.ranks()) * (width + rows) * 4
        batch = 7 * low_rank_fit.BATCH * rows * 4
        return weights + square + training + batch + 20 * validation * rows

    def _deciding(self) -> tuple[str, ...]:
        """Projections that have to be positive for a row to be active."""
        if "gate" not in self.data.ffn.parts:
            return ("up",)
        return ("gate", "up") if self.data.ffn.up_activation else ("gate",)

"""Thresholds by what they cost the model: perplexity with only the predicted rows, against dense.

The validation text decides, so that what is reported of the held-out text was chosen without it.
LLM in a flash, section 4, measures the quality of whole tasks; this is the same in small.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.calibration import probes
from mlx_flash.calibration.text import CalibrationText
from mlx_flash.calibration.text_run import Progress
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors.fitting import Chooser, Figures, Fitted, Fitter
from mlx_flash.predictors.predictor_file import LayerPredictor

ROUNDS = 6  # of raising targets
Mask = Callable[[probes.Seen], mx.array]  # which rows each token keeps, bool [..., rows]
Settled = list[tuple[LayerPredictor, Figures]]
# Loads the model; gives it and of how many tokens logits are computed at once.
Opened = Callable[[], AbstractContextManager[tuple[nn.Module, int]]]


@dataclass
class Checked:
    """What was chosen.

    Args:
        layers: each layer's predictor and its figures.
        perplexities: "held_out" and "validation": dense and predicted; "other_scores": name ->
            perplexity of other ways to choose the same number of rows.
        rounds: the targets that were tried and what they cost on the validation text.
    """

    layers: Settled
    perplexities: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)


class PerplexitySearch:
    """Measures what predictors cost one model, and chooses their targets by it.

    A context manager: the model is loaded when it is first measured, and closed at the end and
    while layers are fitted again, which needs its memory.

    Args:
        opened: loads the model, exact.
        directory: the model's.
        text: sequences.
        dense: perplexity of the model on each part of the text.
        fitter: of the layers.
        progress: called as (stage, done, total).
    """

    def __init__(
        self,
        opened: Opened,
        directory: ModelDirectory,
        text: CalibrationText,
        dense: dict[str, float],
        fitter: Fitter,
        progress: Progress,
    ) -> None:
        self._opened, self._directory, self._text = opened, directory, text
        self._dense, self._fitter, self._progress = dense, fitter, progress
        self._masks: list[Mask | None] = []
        self._stack = ExitStack()
        self._now: tuple[nn.Module, int] | None = None

    def __enter__(self) -> PerplexitySearch:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._now, self._masks = None, []
        self._stack.close()

    def _open(self) -> tuple[nn.Module, int]:
        if self._now is None:
            self._now = self._stack.enter_context(self._opened())
            probes.watch(self._now[0], self._directory.ffn, self._masked)
        return self._now

    def _masked(self, seen: probes.Seen) -> mx.array:
        mask = self._masks[seen.layer]
        return seen.h if mask is None else mx.where(mask(seen), seen.h, 0)

    def measure(self, part: str, choosers: list[Chooser]) -> float:
        """Perplexity on a part of the text with only the rows that are chosen in each layer."""
        sequences, done = self._text.parts()[part], 0
        stage = f"checking {part.replace('_', ' ')}"
        self._progress(stage, 0, sequences.size)

        def told(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._progress(stage, done, sequences.size)

        masks = [self._mask_of(i, chooser) for i, chooser in enumerate(choosers)]
        model, chunk = self._open()
        self._masks = masks
        return probes.perplexity(model, sequences, chunk, told)

    def _mask_of(self, layer: int, chooser: Chooser) -> Mask | None:
        """The rows that a layer keeps, those that paging would read; None for all."""
        if not isinstance(chooser, LayerPredictor):
            return chooser
        if chooser.whole:
            return None
        rows = self._directory.rows.layers[layer].rows
        predictor = chooser.build(self._directory.ffn, rows)
        return lambda seen: predictor.mask(seen.x, seen.gate)

    def _predicted(self, part: str, layers: Settled) -> dict[str, float]:
        found = self.measure(part, [layer for layer, _ in layers])
        dense = self._dense[part]
        return {"dense": dense, "predicted": found, "loss": found / dense - 1}

    def raise_targets(
        self,
        fitted: list[Fitted],
        target: float,
        max_loss: float,
        refit: Callable[[int, float], Fitted],
    ) -> Checked:
        """While the perplexity loss exceeds ``max_loss``, raise the target of the worse half of the
        layers: halve 1 - target.

        Args:
            fitted: each layer, fitted for ``target``; replaced where a layer is fitted anew.
            target: share of the active rows to name at first.
            max_loss: increase of the perplexity on the validation text, as a share.
            refit: fits a layer for another target.
        """
        fitter = self._fitter
        targets = [target] * len(fitted)
        chosen = [fitter.settle(i, entry, target) for i, entry in enumerate(fitted)]
        rounds = []
        for left in reversed(range(ROUNDS + 1)):
            found = self._predicted("validation", chosen)
            rounds.append({"targets": list(targets), **found})
            if not left or found["loss"] <= max_loss:
                break
            errors = [figures["output_error"] for _, figures in chosen]
            worse = np.argsort(errors)[::-1][: -(-len(fitted) // 2)]
            again = [int(i) for i in worse if errors[i] > 0]
            if not again:
                break
            if fitter.refits:
                self._close()
            for done, i in enumerate(again):
                self._progress("fitting", done, len(again))
                targets[i] = 1 - (1 - targets[i]) / 2
                if fitter.refits:
                    fitted[i] = refit(i, targets[i])
                chosen[i] = fitter.settle(i, fitted[i], targets[i])
                self._progress("fitting", done + 1, len(again))
        held_out = self._predicted("held_out", chosen)
        return Checked(
            chosen, {"held_out": held_out, "validation": found, "other_scores": {}}, rounds
        )

    def at_target(self, fitted: list[Fitted], target: float) -> Checked:
        """The same target in every layer (higher ones where it costs less did worse when tried)."""
        chosen = [self._fitter.settle(i, entry, target) for i, entry in enumerate(fitted)]
        perplexities: dict[str, Any] = {
            part: self._predicted(part, chosen) for part in ("validation", "held_out")
        }
        others: dict[str, list[Chooser]] = {}
        for i, entry in enumerate(fitted):
            for name, chooser in self._fitter.alternatives(i, entry, target).items():
                others.setdefault(name, []).append(chooser)
        perplexities["other_scores"] = {
            name: self.measure("held_out", choosers) for name, choosers in others.items()
        }
        return Checked(chosen, perplexities)

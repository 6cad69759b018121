"""Thresholds by what they cost the model: perplexity with only the predicted rows, against dense.

The validation text decides, so that what is reported of the held-out text was chosen without it.

Knows: a model that can be opened, whose FFNs are watched, layers that can be settled at a target
and fitted anew. Does not know: how they are fitted. LLM in a flash, section 4, has the quality of
whole tasks; this is in small.
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
from mlx_flash.calibration.settings import Settings
from mlx_flash.calibration.text import CalibrationText
from mlx_flash.models.families import Ffn
from mlx_flash.predictors.predictor_file import LayerPredictor

from .layer_fit import Fitted, LowRankLayers, Mask, ThresholdLayers, mask_of

ROUNDS = 6
Progress = Callable[[str, int, int], Any]
Settled = list[tuple[LayerPredictor, dict[str, Any]]]
Opened = Callable[[], AbstractContextManager[tuple[nn.Module, int]]]


@dataclass
class Checked:
    """What came out.

    Args:
        layers: each layer's predictor and its figures.
        perplexities: held_out and validation, dense and predicted; other scores at the same
            sparsity.
        rounds: what was tried on the validation text.
    """

    layers: Settled
    perplexities: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)


class Quality:
    """Measures one model, and chooses.

    Args:
        opened: loads the model, exact, and says of how many tokens logits are computed at once.
            It is closed while layers are fitted, which needs its memory.
        ffn: of its family.
        text: sequences.
        dense: perplexity of each part of the text.
        progress: called as (stage, done, total).
    """

    def __init__(
        self,
        opened: Opened,
        ffn: Ffn,
        text: CalibrationText,
        dense: dict[str, float],
        progress: Progress,
    ) -> None:
        self._opened, self._ffn, self._text = opened, ffn, text
        self._dense, self._progress = dense, progress
        self._masks: list[Mask | None] = []
        self._stack = ExitStack()
        self._now: tuple[nn.Module, int] | None = None

    def __enter__(self) -> Quality:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._now, self._masks = None, []
        self._stack.close()

    def _open(self) -> tuple[nn.Module, int]:
        if self._now is None:
            self._now = self._stack.enter_context(self._opened())
            probes.watch(self._now[0], self._ffn, self._masked)
        return self._now

    def _masked(self, seen: probes.Seen) -> mx.array:
        mask = self._masks[seen.layer]
        return seen.h if mask is None else mx.where(mask(seen), seen.h, 0)

    def measure(self, part: str, masks: list[Mask | None]) -> float:
        """Perplexity on a part of the text with the rows that masks do not name left out."""
        sequences, done = self._text.parts()[part], 0
        stage = f"checking {part.replace('_', ' ')}"
        self._progress(stage, 0, sequences.size)

        def told(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._progress(stage, done, sequences.size)

        model, chunk = self._open()
        self._masks = masks
        return probes.perplexity(model, sequences, chunk, told)

    def _predicted(self, part: str, layers: Settled) -> dict[str, float]:
        found = self.measure(part, [mask_of(layer, self._ffn) for layer, _ in layers])
        dense = self._dense[part]
        return {"dense": dense, "predicted": found, "loss": found / dense - 1}

    def tighten(
        self,
        layers: LowRankLayers,
        fitted: list[Fitted],
        settings: Settings,
        refit: Callable[[int, float], Fitted],
    ) -> Checked:
        """While the loss is too large, halve what the worse half of the layers may miss.

        Those are fitted again, in place, where there are ranks to choose from: what was cheapest at
        one recall may name most of the rows at another.
        """
        targets = [settings.target_recall] * len(fitted)
        chosen = [layers.settle(i, entry, targets[i]) for i, entry in enumerate(fitted)]
        rounds = []
        for left in reversed(range(ROUNDS + 1)):
            found = self._predicted("validation", chosen)
            rounds.append({"targets": list(targets), **found})
            if not left or found["loss"] <= settings.max_loss:
                break
            errors = [figures["output_error"] for _, figures in chosen]
            worse = np.argsort(errors)[::-1][: -(-len(fitted) // 2)]
            again = [int(i) for i in worse if errors[i] > 0]
            if not again:
                break
            many = len(layers.ranks()) > 1
            if many:
                self._close()
            for done, i in enumerate(again):
                self._progress("fitting", done, len(again))
                targets[i] = 1 - (1 - targets[i]) / 2
                if many:
                    fitted[i] = refit(i, targets[i])
                chosen[i] = layers.settle(i, fitted[i], targets[i])
                self._progress("fitting", done + 1, len(again))
        held_out = self._predicted("held_out", chosen)
        return Checked(
            chosen, {"held_out": held_out, "validation": found, "other_scores": {}}, rounds
        )

    def at_sparsity(
        self, layers: ThresholdLayers, fitted: list[Fitted], sparsity: float
    ) -> Checked:
        """The sparsity asked for in every layer; more where it costs less did worse when tried."""
        chosen = [layers.settle(i, entry, sparsity) for i, entry in enumerate(fitted)]
        perplexities = {part: self._predicted(part, chosen) for part in ("validation", "held_out")}
        others = self._others(layers, fitted, sparsity)
        return Checked(chosen, {**perplexities, "other_scores": others})

    def _others(
        self, layers: ThresholdLayers, fitted: list[Fitted], sparsity: float
    ) -> dict[str, float]:
        """Perplexities on the held-out text at the same sparsity, by other scores."""
        masks: dict[str, list[Mask | None]] = {}
        for i, entry in enumerate(fitted):
            for name, mask in layers.other_masks(i, entry, sparsity).items():
                masks.setdefault(name, []).append(mask)
        return {name: self.measure("held_out", found) for name, found in masks.items()}

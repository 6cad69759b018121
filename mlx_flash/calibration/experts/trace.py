"""Which experts each token of a text was given, recorded while the model runs.

A watcher around every switch module, paged or not, keeps the expert numbers that the router hands
over, and those that the next layer's router would choose for the same hidden state. They go to a
working directory sequence by sequence, so that an interrupted recording goes on behind them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.calibration import probes, recordings
from mlx_flash.errors import CalibrationError, FlashWarning
from mlx_flash.paging.prefetch import best_experts
from mlx_flash.runtime.pagers.experts import ExpertPager

Scores = Callable[[mx.array], mx.array]


class Recorder:
    """Records what the routers of a loaded mixture choose, and what they foretell a layer ahead.

    Args:
        model: from ``load_model``; its switch modules are wrapped for good.
        top_k: experts per token.
    """

    def __init__(self, model: nn.Module, top_k: int) -> None:
        pager = model.flash.pager
        if not isinstance(pager, ExpertPager):
            raise CalibrationError("the model has no experts to record; it is not a mixture")
        self._model, self._top_k = model, top_k
        layers = len(pager.found)
        ahead = [pager.scores(i) if i else None for i in range(layers)]
        self._chosen: list[list[np.ndarray]] = [[] for _ in range(layers)]
        self._foretold: list[list[np.ndarray]] = [[] for _ in range(layers)]
        paths = [path for path, _ in pager.found]
        watchers = [self._watcher(i, scores) for i, scores in enumerate([*ahead[1:], None])]
        probes.tap(model, dict(zip(paths, watchers, strict=True)))

    def _watcher(self, layer: int, ahead: Scores | None) -> Callable[..., mx.array]:
        def seen(x: mx.array, indices: mx.array, *_: Any) -> mx.array:
            guess = None if ahead is None else best_experts(ahead(x), self._top_k)
            mx.eval(indices, *([] if guess is None else [guess]))
            self._chosen[layer].append(_flat(indices))
            if guess is not None:
                self._foretold[layer + 1].append(_flat(guess))
            return x

        return seen

    def run(self, tokens: np.ndarray, chunk: int) -> dict[str, np.ndarray]:
        """Run one sequence.

        Args:
            tokens: token ids.
            chunk: how many of them the model takes at once.

        Returns:
            ``chosen-i`` of each layer i and ``foretold-i`` where a layer is foretold: expert
            numbers, uint16 [tokens, experts per token].

        Raises:
            CalibrationError: a layer's switch did not see each token once.
        """
        for lists in (self._chosen, self._foretold):
            for found in lists:
                found.clear()
        probes.run(self._model, tokens, chunk)
        arrays = {}
        for name, lists in (("chosen", self._chosen), ("foretold", self._foretold)):
            for layer, found in enumerate(lists):
                if not found and name == "foretold":
                    continue
                array = np.concatenate(found) if found else np.zeros((0, 0), np.uint16)
                if len(array) != len(tokens):
                    raise CalibrationError(
                        f"layer {layer} routed {len(array)} tokens where the model was given "
                        f"{len(tokens)}; the use of this family's experts cannot be counted"
                    )
                arrays[f"{name}-{layer}"] = array
        return arrays


def _flat(numbers: mx.array) -> np.ndarray:
    array = np.array(numbers, copy=False)
    return array.reshape(-1, array.shape[-1]).astype(np.uint16)


def save(path: Path, sequence: int, arrays: dict[str, np.ndarray]) -> None:
    """Keep what was recorded of one sequence; whole or not there."""
    recordings.save_arrays(_file(path, sequence), **arrays)


def recorded(path: Path, sequences: int) -> int:
    """How many of the first sequences are kept, whole; warns of the first that is not."""
    for i in range(sequences):
        file = _file(path, i)
        if recordings.load_arrays(file) is None:
            if file.is_file():
                message = f"{file} is damaged; the experts of its tokens are recorded again"
                warnings.warn(FlashWarning(message), stacklevel=3)
            return i
    return sequences


def load(path: Path, sequences: range, layer: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(chosen, foretold or None) of one layer in some sequences, [sequences, tokens, experts]."""
    chosen, foretold = [], []
    for i in sequences:
        with np.load(_file(path, i)) as saved:
            chosen.append(saved[f"chosen-{layer}"])
            if f"foretold-{layer}" in saved.files:
                foretold.append(saved[f"foretold-{layer}"])
    return np.stack(chosen), np.stack(foretold) if foretold else None


def _file(path: Path, sequence: int) -> Path:
    return path / f"experts-{sequence:05d}.npz"

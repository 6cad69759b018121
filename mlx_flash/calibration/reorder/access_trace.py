"""Which rows each token of a text asks for, by the predictor that a model directory runs with.

Knows: predictors, the recordings of ``spool``. Does not know: what order is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flash.calibration import probes, recordings
from mlx_flash.calibration.neurons.perplexity_search import Progress
from mlx_flash.calibration.probes import Seen
from mlx_flash.calibration.text import CalibrationText
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.predictors.selection import Selection
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions

KIND = "rows"  # of recording, see ``spool.FILES``
PARTS = ("train", "held_out")


def asked(directory: ModelDirectory, selection: Selection) -> Callable[[Seen], mx.array]:
    """A function of what an FFN saw: which rows are asked for, bool [..., rows]."""
    predictors = [
        trained.build(directory.ffn, layer.rows)
        for trained, layer in zip(selection.layers, directory.rows.layers, strict=True)
    ]
    return lambda seen: predictors[seen.layer].mask(seen.x, seen.gate)


def record(
    directory: ModelDirectory,
    selection: Selection,
    text: CalibrationText,
    work: Path,
    ram: int | None,
    progress: Progress,
) -> None:
    """Run the model over a text and write what its tokens ask for; goes on where it stopped.

    Args:
        work: from ``spool.working_directory``.
    """
    ffn, layers = directory.ffn, len(directory.rows.layers)
    recorder = recordings.Recorder(work, KIND, layers, families.up_function(ffn))
    sequences = [(name, tokens) for name in PARTS for tokens in text.parts()[name]]
    progress("recording", recorder.done * text.length, len(sequences) * text.length)
    if recorder.done == len(sequences):
        return
    find = asked(directory, selection)

    def watcher(seen: Seen) -> mx.array:
        recorder(replace(seen, h=find(seen).astype(seen.x.dtype)))
        return seen.h

    model = load_model(directory, PagingOptions(ram=ram, context=text.length, predictor="none"))
    try:
        probes.watch(model, ffn, watcher)
        for name, tokens in sequences[recorder.done :]:
            recorder.part = name
            probes.run(model, tokens, model.flash.plan.step)
            recorder.commit()
            progress("recording", recorder.done * text.length, len(sequences) * text.length)
    finally:
        model.flash.close()


def recorded(directory: ModelDirectory, work: Path, layer: int, part: str) -> np.ndarray:
    """What was recorded of a layer, bool [tokens, rows]."""
    rows = directory.rows.layers[layer].rows
    return recordings.Part(work, layer, part, rows, directory.d_model, directory.dtype).active()

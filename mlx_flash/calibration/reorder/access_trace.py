"""Which rows each token of a text asks for, by the predictor that a model directory runs with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flash.calibration import probes, recordings
from mlx_flash.calibration.probes import Seen
from mlx_flash.calibration.text_run import TextRun
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.predictors.selection import Selection

PARTS = ("train", "held_out")  # of the text
RECORDS = dict.fromkeys(PARTS, ("active",))


def asked(directory: ModelDirectory, selection: Selection) -> Callable[[Seen], mx.array]:
    """A function of what an FFN saw: which rows are asked for, bool [..., rows]."""
    predictors = [
        trained.build(directory.ffn, layer.rows)
        for trained, layer in zip(selection.layers, directory.rows.layers, strict=True)
    ]
    return lambda seen: predictors[seen.layer].mask(seen.x, seen.gate)


def record(run: TextRun, selection: Selection) -> None:
    """Write what the tokens of a text ask for to the run's working directory.

    What is interrupted goes on when the same call is made again.
    """
    directory, text, progress = run.directory, run.text, run.progress
    ffn, layers = directory.ffn, len(directory.rows.layers)
    recorder = recordings.Recorder(run.work, RECORDS, layers, families.up_function(ffn))
    sequences = [(name, tokens) for name in PARTS for tokens in text.parts()[name]]
    progress("recording", recorder.done * text.length, len(sequences) * text.length)
    if recorder.done == len(sequences):
        return
    find = asked(directory, selection)

    def watcher(seen: Seen) -> mx.array:
        recorder(replace(seen, h=find(seen).astype(seen.x.dtype)))
        return seen.h

    with run.model() as model:
        probes.watch(model, ffn, watcher)
        for name, tokens in sequences[recorder.done :]:
            recorder.part = name
            probes.run(model, tokens, model.flash.plan.step)
            recorder.commit()
            progress("recording", recorder.done * text.length, len(sequences) * text.length)


def recorded(directory: ModelDirectory, work: Path, layer: int, part: str) -> np.ndarray:
    """What was recorded of a layer, bool [tokens, rows]."""
    rows = directory.rows.layers[layer].rows
    return recordings.Part(work, layer, part, rows, directory.d_model, directory.dtype).active()

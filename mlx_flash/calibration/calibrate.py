"""Fit predictors to a model directory: which rows fire on real text, and what tells beforehand.

In turn: the model runs over the text and what its FFNs do is recorded on disk; predictors are
fitted layer by layer; thresholds are chosen by the perplexity that they cost. All within the RAM
budget. What is interrupted goes on when the same call is made again. Predictors are written last,
whole or not at all.

Knows: the order of work. Does not know: how a layer is fitted (``layer_fit``), where recordings lie
(``spool``), what perplexities decide (``quality``), how figures are shown (``report``). LLM in a
flash, sections 3.1 and 4.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.calibration.neurons.layer_fit import Fitted, LowRankLayers, ThresholdLayers
from mlx_flash.calibration.neurons.perplexity_search import Checked, Progress, Quality
from mlx_flash.common.files import digest_of
from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import parse_ram, show
from mlx_flash.errors import BudgetError, CalibrationError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.models.families import projections
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import Predictors
from mlx_flash.runtime.load import load_model, load_tokenizer
from mlx_flash.runtime.memory_requirements import MLX_CACHE
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

from . import probes, recordings, report
from . import text as text_module
from .experts import measure
from .settings import Settings, check_settings
from .text import CalibrationText

FORMAT_VERSION = 3
BIASES = "biases.npz"


def calibrate(
    path: str | Path,
    data: str | Path | None = None,
    *,
    kind: str | None = None,
    rank: int | str = "auto",
    target_recall: float = 0.95,
    sparsity: float = 0.5,
    nonlinearity: str = "none",
    tokens: int | None = None,
    ram: int | str | None = None,
    seed: int = 0,
    max_loss: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write predictors and a report into a model directory.

    Of a mixture nothing is predicted: see ``expert_demand.measure``, which takes ``data``,
    ``tokens``, ``ram`` and ``seed``.

    Args:
        path: model directory made by ``mlx_flash convert``.
        data: text to calibrate on, see ``calibration_text.load``; None for the one that ships.
        kind: low-rank or threshold; None takes low-rank where the activation has zeros.
        rank: of low-rank predictors; "auto" chooses one for each layer by what it costs.
        target_recall: share of the active rows that a low-rank predictor has to name.
        sparsity: share of the rows that a threshold leaves out.
        nonlinearity: between the matrices of a low-rank predictor, none or relu.
        tokens: to train on; default 16384 for low-rank predictors, 4096 for thresholds.
        ram: bytes or text such as "4GB" that the whole process may take.
        seed: of what is chosen by chance; the same seed, text and settings give the same file.
        max_loss: how much worse the perplexity may get before low-rank predictors are given a
            higher recall; 0.01 for one in a hundred.
        progress: called as (stage, done, total).

    Returns:
        The report, as in calibration.json.

    Raises:
        CalibrationError: the text, a setting, or what came out is not usable.
        FlashError: the model directory cannot be opened, the budget is too small.
    """
    directory = ModelDirectory(path)
    if directory.mixture:
        given = (kind, rank, target_recall, sparsity, nonlinearity, max_loss)
        if given != (None, "auto", 0.95, 0.5, "none", 0.01):
            raise CalibrationError(
                f"{directory.path} is a mixture of experts, whose router says which experts a "
                "token needs: no predictors are fitted, it is measured what layers are asked for; "
                "give text, tokens, seed and RAM budget only"
            )
        return measure.measure(
            directory, data, tokens=tokens, ram=ram, seed=seed, progress=progress
        )
    settings = check_settings(
        directory, kind, rank, target_recall, sparsity, nonlinearity, tokens, seed, max_loss
    )
    budget = None if ram is None else parse_ram(ram)
    if not os.access(directory.path, os.W_OK | os.X_OK):
        raise CalibrationError(f"no permission to write in {directory.path}; predictors go there")
    positions = directory.config.get("max_position_embeddings")
    tokenizer = load_tokenizer(directory)
    text = text_module.load(data, tokenizer, settings.tokens, positions, seed)
    del tokenizer
    work = recordings.path_for(directory)
    counts = {name: part.size for name, part in text.parts().items()}
    config = directory.config["flash"]["config_sha256"]
    key = digest_of([FORMAT_VERSION, config, text.sha256, dataclasses.asdict(settings)])
    recordings.check_disk(work, recordings.disk_bytes(directory, settings.kind, counts))
    with recordings.working_directory(work, key):
        job = _Job(directory, settings, text, work, budget, progress or (lambda *_: None))
        with _reader(directory, budget) as reader:
            found = job.run(reader)
        recordings.remove(work)
    return found


@contextmanager
def _reader(directory: ModelDirectory, ram: int | None) -> Iterator[RowReader]:
    limit = mx.set_cache_limit(MLX_CACHE) if ram is not None else None
    reader = RowReader(directory.rows)
    try:
        yield reader
    finally:
        reader.close()
        if limit is not None:
            mx.set_cache_limit(limit)


def _release() -> None:
    """Give back what a closed model held: its FFNs know each other, so only a collection does."""
    gc.collect()
    mx.clear_cache()
    current_platform().trim()


class _Job:
    """One calibration."""

    def __init__(
        self,
        directory: ModelDirectory,
        settings: Settings,
        text: CalibrationText,
        work: Path,
        ram: int | None,
        progress: Progress,
    ) -> None:
        self.directory, self.settings, self.text = directory, settings, text
        self.work, self.ram, self.progress = work, ram, progress
        self.ffn = directory.ffn
        self.count = len(directory.rows.layers)
        self.seconds: dict[str, float] = {}

    def run(self, reader: RowReader) -> dict[str, Any]:
        """All of it; returns the report."""
        with self._timed("recording"):
            recorder = self._record()
        with self._timed("fitting"):
            layers = self._layers(reader, recorder)
            fitted = []
            for i in range(self.count):
                self.progress("fitting", i, self.count)
                fitted.append(self._fit(layers, i, self._target()))
                self.progress("fitting", i + 1, self.count)
        with self._timed("checking"):
            dense = {
                name: probes.mean_perplexity(recorder.losses[name], self.text.parts()[name])
                for name in ("validation", "held_out")
            }
            checked = self._check(layers, fitted, dense)
        return self._write(fitted, checked)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)

    @contextmanager
    def _model(self, reserve: int) -> Iterator[tuple[nn.Module, int]]:
        """(the model, tokens of a chunk whose logits fit), ``reserve`` bytes of the budget left."""
        ram = None
        if self.ram is not None:
            reserve += probes.logits_bytes(self.directory)
            ram = max(1, self.ram - reserve)
        gc.collect()
        try:
            model = load_model(
                self.directory, PagingOptions(ram=ram, context=self.text.length, predictor="none")
            )
        except BudgetError as error:
            raise BudgetError(
                f"calibration takes {show(reserve)} of the RAM budget for logits and predictors; "
                f"with the rest: {error}"
            ) from error
        try:
            yield model, probes.chunk_size(self.directory, model.flash.plan.step)
        finally:
            model.flash.close()
            del model
            _release()

    def _record(self) -> recordings.Recorder:
        """Run the model over the text, and write what its FFNs do."""
        recorder = recordings.Recorder(
            self.work, self.settings.kind, self.count, families.up_function(self.ffn)
        )
        sequences = [(name, s) for name, part in self.text.parts().items() for s in part]
        total, length = len(sequences) * self.text.length, self.text.length
        self.progress("recording", recorder.done * length, total)
        if recorder.done == len(sequences) and (self.work / BIASES).is_file():
            return recorder
        with self._model(0) as (model, chunk):
            self._save_biases(model)
            probes.watch(model, self.ffn, recorder)
            for name, tokens in sequences[recorder.done :]:
                recorder.part = name
                if name == "train":
                    probes.run(model, tokens, model.flash.plan.step)
                else:
                    recorder.losses[name] += probes.loss(model, tokens, chunk)
                recorder.commit()
                self.progress("recording", recorder.done * length, total)
        return recorder

    def _save_biases(self, model: nn.Module) -> None:
        """Biases of the projections before the activation, which are no part of the rows."""
        biases = {}
        for layer, (_, mlp) in enumerate(model.flash.pager.found):
            for part, name in projections(self.ffn).items():
                if part != "down" and "bias" in mlp[name]:
                    bias = np.array(mlp[name].bias.astype(mx.float32))
                    if self.ffn.fused:
                        bias = np.split(bias, 2)[part == "up"]
                    biases[f"{layer}.{part}"] = bias
        with open(self.work / BIASES, "wb") as f:
            np.savez(f, **biases)

    def _layers(
        self, reader: RowReader, recorder: recordings.Recorder
    ) -> LowRankLayers | ThresholdLayers:
        common = (self.directory, reader, self.work, self.settings)
        with np.load(self.work / BIASES) as saved:
            biases = {name: saved[name] for name in saved.files}
        if self.settings.kind == "low-rank":
            layers = LowRankLayers(*common, biases=biases)
        else:
            squares = [
                total / count if count else None
                for total, count in zip(recorder.squares, recorder.counts, strict=True)
            ]
            layers = ThresholdLayers(*common, mean_squares=squares, biases=biases)
        self._check_budget(layers)
        return layers

    def _check_budget(self, layers: LowRankLayers | ThresholdLayers) -> None:
        """Raise BudgetError where fitting the widest layer would not fit."""
        _release()
        if self.ram is None:
            return
        rows = max(layer.rows for layer in self.directory.rows.layers)
        needed = current_platform().process_bytes()
        needed += layers.fit_bytes(rows, self.text.validation.size)
        needed += self.count * layers.held_bytes(rows)
        if needed > self.ram:
            raise BudgetError(
                f"RAM budget {show(self.ram)} is too small to fit predictors of {rows} rows; "
                f"{show(needed)} would do"
            )

    def _target(self) -> float:
        """What a layer's predictor is fitted for at first."""
        low_rank = self.settings.kind == "low-rank"
        return self.settings.target_recall if low_rank else self.settings.sparsity

    def _fit(self, layers: LowRankLayers | ThresholdLayers, layer: int, target: float) -> Fitted:
        name = f"{layer:03d}-{target!r}"
        if kept := recordings.load_layer(self.work, name):
            return Fitted(kept[1], kept[0])
        fitted = layers.fit(layer, target)
        recordings.save_layer(self.work, name, fitted.figures, fitted.arrays)
        return fitted

    def _check(
        self,
        layers: LowRankLayers | ThresholdLayers,
        fitted: list[Fitted],
        dense: dict[str, float],
    ) -> Checked:
        """Choose thresholds, and ranks, by the perplexity that they cost."""

        def opened() -> AbstractContextManager[tuple[nn.Module, int]]:
            return self._model(sum(a.nbytes for entry in fitted for a in entry.arrays.values()))

        with Quality(opened, self.ffn, self.text, dense, self.progress) as quality:
            if self.settings.kind == "low-rank":
                refit = functools.partial(self._fit, layers)
                return quality.tighten(layers, fitted, self.settings, refit)
            return quality.at_sparsity(layers, fitted, self.settings.sparsity)

    def _write(self, fitted: list[Fitted], checked: Checked) -> dict[str, Any]:
        """The report, then the predictors."""
        layers = [
            {"layer": i, **entry.figures, **figures}
            for i, (entry, (_, figures)) in enumerate(zip(fitted, checked.layers, strict=True))
        ]
        found = report.build(
            self.directory,
            self.settings,
            self.text,
            layers,
            checked.perplexities,
            checked.rounds,
            self.seconds,
        )
        predictors = Predictors(
            self.settings.kind,
            self.directory.rows.fingerprint,
            [layer for layer, _ in checked.layers],
            report.measured(found),
        )
        report.write(self.directory.path, found)
        predictor_file.write(self.directory.path / predictor_file.NAME, predictors)
        return found

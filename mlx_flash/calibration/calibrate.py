"""Fit predictors to a model directory: which rows fire on real text, and what tells beforehand.

In turn: the model runs over the text and what its FFNs do is recorded on disk; predictors are
fitted layer by layer; thresholds are chosen by the perplexity that they cost. All within the RAM
budget. What is interrupted goes on when the same call is made again. Predictors are written last,
whole or not at all. LLM in a flash, sections 3.1 and 4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.common.files import digest_of
from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import parse_ram, show
from mlx_flash.errors import BudgetError, CalibrationError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.models.families import projections
from mlx_flash.predictors import predictor_file, registry
from mlx_flash.predictors.fitting import Fitted, Fitter
from mlx_flash.predictors.predictor_file import Predictors
from mlx_flash.storage.reader import RowReader

from . import probes, recordings, report_files
from .experts import measure
from .neurons import report
from .neurons.perplexity_search import Checked, PerplexitySearch
from .neurons.training_data import RecordedModel
from .settings import Settings, check_settings
from .text import CalibrationText
from .text_run import Progress, TextRun, check_writable, release, small_cache, tokenised

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

    Of a mixture nothing is predicted: see ``experts.measure``, which takes ``data``,
    ``tokens``, ``ram`` and ``seed``.

    Args:
        path: model directory made by ``mlx_flash convert``.
        data: text to calibrate on, see ``text.load``; None for the one that ships.
        kind: one of ``registry.fitted()``; None takes low-rank where the activation has zeros.
        rank: of low-rank predictors; "auto" chooses one for each layer by what it costs.
        target_recall: share of the active rows that a low-rank predictor has to name.
        sparsity: share of the rows that a threshold leaves out.
        nonlinearity: between the matrices of a low-rank predictor, none or relu.
        tokens: to train on; default 16384 for low-rank predictors, 4096 for thresholds.
        ram: bytes or text such as "4GB" that the whole process may take.
        seed: of the random choices; the same seed, text and settings give the same file.
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
    given = Settings(kind, rank, target_recall, sparsity, nonlinearity, tokens, seed, max_loss)
    if directory.mixture:
        if given != Settings(tokens=tokens, seed=seed):
            raise CalibrationError(
                f"{directory.path} is a mixture of experts, whose router says which experts a "
                "token needs: no predictors are fitted, it is measured what layers are asked for; "
                "give text, tokens, seed and RAM budget only"
            )
        return measure.measure(
            directory, data, tokens=tokens, ram=ram, seed=seed, progress=progress
        )
    settings = check_settings(directory, given)
    budget = None if ram is None else parse_ram(ram)
    check_writable(directory, "predictors")
    text = tokenised(directory, data, settings.tokens, seed)
    work = recordings.path_for(directory)
    counts = {name: part.size for name, part in text.parts().items()}
    config = directory.config["flash"]["config_sha256"]
    key = digest_of([FORMAT_VERSION, config, text.sha256, dataclasses.asdict(settings)])
    needed = recordings.disk_bytes(directory, settings.training.records, counts)
    recordings.check_disk(work, needed)
    with recordings.working_directory(work, key):
        run = Calibration(directory, settings, text, work, budget, progress)
        with small_cache(budget), closing(RowReader(directory.rows)) as reader:
            found = run.run(reader)
        recordings.remove(work)
    return found


class Calibration(TextRun):
    """One calibration, its settings complete."""

    name = "calibration"

    def __init__(
        self,
        directory: ModelDirectory,
        settings: Settings,
        text: CalibrationText,
        work: Path,
        ram: int | None,
        progress: Progress | None,
    ) -> None:
        super().__init__(directory, text, work, ram, progress)
        self.settings = settings
        self.ffn = directory.ffn
        self.count = len(directory.rows.layers)

    def run(self, reader: RowReader) -> dict[str, Any]:
        """All of it; returns the report."""
        with self.timed("recording"):
            recorder = self._record()
        with self.timed("fitting"):
            fitter = self._fitter(reader, recorder)
            fitted = []
            for i in range(self.count):
                self.progress("fitting", i, self.count)
                fitted.append(self._fit(fitter, i, self.settings.target))
                self.progress("fitting", i + 1, self.count)
        with self.timed("checking"):
            dense = {
                name: probes.mean_perplexity(recorder.losses[name], self.text.parts()[name])
                for name in ("validation", "held_out")
            }
            checked = self._check(fitter, fitted, dense)
        return self._write(fitted, checked)

    @contextmanager
    def _model(self, reserve: int) -> Iterator[tuple[nn.Module, int]]:
        """(the model, tokens of a chunk whose logits fit), ``reserve`` bytes of the budget left."""
        reserve += probes.logits_bytes(self.directory)
        with self.model(reserve, "logits and predictors") as model:
            try:
                yield model, probes.chunk_size(self.directory, model.flash.plan.step)
            finally:
                del model  # or it would outlive the collection at its end

    def _record(self) -> recordings.Recorder:
        """Run the model over the text, and write what its FFNs do."""
        recorder = recordings.Recorder(
            self.work, self.settings.training.records, self.count, families.up_function(self.ffn)
        )
        sequences = [(name, s) for name, part in self.text.parts().items() for s in part]
        total, length = len(sequences) * self.text.length, self.text.length
        self.progress("recording", recorder.done * length, total)
        if recorder.done == len(sequences) and self._biases() is not None:
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
        recordings.save_arrays(self.work / BIASES, **biases)

    def _biases(self) -> dict[str, np.ndarray] | None:
        return recordings.load_arrays(self.work / BIASES)

    def _fitter(self, reader: RowReader, recorder: recordings.Recorder) -> Fitter:
        """What fits the layers, and has the memory to."""
        biases, squares = self._biases() or {}, recorder.mean_squares()
        data = RecordedModel(self.directory, reader, self.work, self.settings, biases, squares)
        fitter: Fitter = registry.load(self.settings.training.fitter)(data)
        release()
        if self.ram is not None:
            self._check_budget(fitter, self.ram)
        return fitter

    def _check_budget(self, fitter: Fitter, ram: int) -> None:
        """Raise BudgetError where fitting the widest layer would not fit."""
        rows = max(layer.rows for layer in self.directory.rows.layers)
        needed = current_platform().process_bytes() + fitter.fit_bytes(
            rows, self.text.validation.size
        )
        needed += self.count * fitter.held_bytes(rows)
        if needed > ram:
            raise BudgetError(
                f"RAM budget {show(ram)} is too small to fit predictors of {rows} rows; "
                f"{show(needed)} would do"
            )

    def _fit(self, fitter: Fitter, layer: int, target: float) -> Fitted:
        """One layer fitted for a target, from the working directory where it was done before."""
        name = f"{layer:03d}-{target!r}"
        if kept := recordings.load_layer(self.work, name):
            return Fitted(kept[1], kept[0])
        fitted = fitter.fit(layer, target)
        recordings.save_layer(self.work, name, fitted.figures, fitted.arrays)
        return fitted

    def _check(self, fitter: Fitter, fitted: list[Fitted], dense: dict[str, float]) -> Checked:
        """Choose thresholds, and ranks, by the perplexity that they cost."""
        settings = self.settings

        def opened() -> AbstractContextManager[tuple[nn.Module, int]]:
            return self._model(sum(a.nbytes for entry in fitted for a in entry.arrays.values()))

        with PerplexitySearch(
            opened, self.directory, self.text, dense, fitter, self.progress
        ) as search:
            if settings.training.raised:
                refit = functools.partial(self._fit, fitter)
                return search.raise_targets(fitted, settings.target, settings.max_loss, refit)
            return search.at_target(fitted, settings.target)

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
        report_files.write(self.directory.path, found, report.table, report.draw)
        predictor_file.write(self.directory.path / predictor_file.NAME, predictors)
        return found

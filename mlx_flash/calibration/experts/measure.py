"""Measure which experts each layer of a mixture uses, so that a budget goes where it saves most.

The model runs over text, paged within the budget, and the choices of its routers are recorded. The
training part of the text gives each layer's miss-ratio curve. On the rest, slots shared out by the
curves are compared with equal shares, and used only if they do better. What is interrupted goes on
when the same call is made again; the file is written last, whole or not at all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.calibration import recordings, report_files
from mlx_flash.calibration.text import CalibrationText
from mlx_flash.calibration.text_run import (
    Progress,
    TextRun,
    check_writable,
    small_cache,
    tokenised,
)
from mlx_flash.common.files import digest_of
from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import CalibrationError
from mlx_flash.model_directory import expert_demand_file
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.model_directory.expert_demand_file import ExpertDemand
from mlx_flash.models import mixtures
from mlx_flash.runtime.memory_requirements import paging_requirements

from . import figures as figures_module
from . import report, trace
from .figures import Asked

FORMAT_VERSION = 1
TOKENS = 4096  # to make the curves from


@dataclass(frozen=True)
class Settings:
    """What a measurement is asked for."""

    kind: str
    tokens: int
    seed: int


def measure(
    directory: ModelDirectory,
    data: str | Path | None = None,
    *,
    tokens: int | None = None,
    ram: int | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``experts.json`` and a report into a mixture's directory.

    Args:
        directory: of a mixture.
        data: text, see ``text.load``; None for the one that ships.
        tokens: number to make the curves from; default 4096. An eighth as many fill the slots, and
            a quarter as many compare ways to share slots out.
        ram: bytes or text such as "4GB" that the whole process may take.
        seed: picks the sequences from a longer text.
        progress: called as (stage, done, total).

    Returns:
        The report, as in calibration.json.

    Raises:
        CalibrationError: the text or a setting is not usable.
        BudgetError: the budget is too small.
    """
    if directory.mixture is None:
        raise CalibrationError(
            f"{directory.path} is not a mixture of experts; fit predictors to it with calibrate"
        )
    if seed < 0:
        raise CalibrationError(f"seed {seed}; expected one from 0 on")
    settings = Settings("experts", TOKENS if tokens is None else tokens, seed)
    budget = None if ram is None else parse_ram(ram)
    check_writable(directory, "the figures")
    text = tokenised(directory, data, settings.tokens, seed)
    work = recordings.path_for(directory)
    what = ("experts", FORMAT_VERSION, directory.rows.fingerprint, text.sha256, asdict(settings))
    key = digest_of(what)
    with recordings.working_directory(work, key):
        found = Measurement(directory, settings, text, work, budget, progress).run()
        recordings.remove(work)
    return found


class Measurement(TextRun):
    """One measurement, its settings complete."""

    name = "measuring"

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
        self.sequences = np.concatenate(list(text.parts().values()))
        self.layers = len(directory.rows.layers)

    def run(self) -> dict[str, Any]:
        """All of it; returns the report."""
        with self.timed("recording"):
            self._record()
        with self.timed("counting"):
            train = range(len(self.text.train))
            rest = range(len(train), len(self.sequences))
            figures, unseen = [], []
            for layer in range(self.layers):
                self.progress("counting", layer, self.layers)
                figures.append(figures_module.layer_figures(self._asked(layer, train)))
                other = self._asked(layer, rest)
                warm = self.text.validation.size
                unseen.append(figures_module.curve(other.trace(), other.experts, warm))
            self.progress("counting", self.layers, self.layers)
            needs = paging_requirements(self.directory, None)
            splits = figures_module.compare_splits(figures, needs, unseen)
        return self._write(figures, splits)

    def _record(self) -> None:
        """Run the model over the sequences that are not recorded yet."""
        count, length = len(self.sequences), self.text.length
        done = trace.recorded(self.work, count)
        self.progress("recording", done * length, count * length)
        if done == count:
            return
        top_k = mixtures.expert_counts(self.directory.config, self.directory.mixture)[1]
        reserve = 2 * 2 * top_k * self.layers * length
        with (
            small_cache(self.ram),
            self.model(reserve, "what is recorded", lookahead=False) as model,
        ):
            recorder = trace.Recorder(model, top_k)
            for i in range(done, count):
                found = recorder.run(self.sequences[i], model.flash.plan.step)
                trace.save(self.work, i, found)
                self.progress("recording", (i + 1) * length, count * length)

    def _asked(self, layer: int, sequences: range) -> Asked:
        chosen, foretold = trace.load(self.work, sequences, layer)
        return Asked(self.directory.rows.layers[layer].rows, chosen, foretold)

    def _write(self, figures: list[dict[str, Any]], splits: dict[str, Any]) -> dict[str, Any]:
        """The report, then the file."""
        found = report.build(
            self.directory, asdict(self.settings), self.text, figures, splits, self.seconds
        )
        demand = ExpertDemand(
            self.directory.rows.fingerprint,
            found["used"] == "measured",
            tuple(tuple(layer["misses"]) for layer in figures),
            report.measured(found),
        )
        path = self.directory.path
        report_files.write(path, found, report.table, report.draw)
        expert_demand_file.write(path / expert_demand_file.NAME, demand)
        return found

"""What a RAM budget buys of a model: the plan that loading makes, and the speed to expect.

Knows: directories, plans, what was measured. Does not know: what is printed, command lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import parse_ram, with_margin
from mlx_flash.errors import BudgetError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging.policies import DEFAULT_POLICY
from mlx_flash.runtime.load import choose_predictors, load_tokenizer
from mlx_flash.runtime.memory_plan import Plan, least_budget, plan_for
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.runtime.pagers.back_end import check_back_end
from mlx_flash.storage.reader import RowReader

from . import disk_speed
from .forecast import Forecast, Layers, TrialRun, forecast
from .trial_run import Model, run_trial

Progress = Callable[[str], Any]


@dataclass
class View:
    """One budget.

    Args:
        ram: bytes.
        plan: None where the budget does not work.
        forecast: None where nothing was measured that it could be made from.
        reason: why there is no plan or no forecast.
    """

    ram: int
    plan: Plan | None = None
    forecast: Forecast | None = None
    reason: str = ""


class BudgetForecast:
    """Budgets of one model directory.

    Args:
        options: how it is to be run; their budget does not count.

    Raises:
        FlashError: the model cannot be run that way.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        options: PagingOptions | None = None,
    ) -> None:
        options = options or PagingOptions()
        check_back_end(directory)
        self.directory, self.options = directory, options
        self.tokenizer = load_tokenizer(directory)  # a part of what a process takes
        self.selection = choose_predictors(directory, options)
        reader = RowReader(directory.rows)
        try:
            self.needs = memory_requirements(directory, reader, options, self.selection)
            self.direct = reader.direct
        finally:
            reader.close()
        self.model = Model(directory, self.needs, self.selection, options, self.tokenizer)
        layers = directory.rows.layers
        self.layers = Layers(
            tuple(layer.rows for layer in layers),
            tuple(directory.rows.layer_bytes(i) for i in range(len(layers))),
        )
        self.disk: disk_speed.DiskSpeed | None = None
        self.trial = TrialRun()

    @property
    def least(self) -> int:
        """The smallest budget that works."""
        return with_margin(least_budget(self.needs, self.options))

    @property
    def most(self) -> int:
        """The budget from which on everything is resident."""
        return with_margin(self.needs.dense)

    def plan(self, ram: int) -> Plan:
        """The plan that ``load`` makes of a budget; raises BudgetError."""
        machine = current_platform().machine_bytes()
        return plan_for(self.needs, self.options.replace(ram=ram), machine)

    def measure(self, ram: int, again: bool = False, progress: Progress | None = None) -> None:
        """Measure disk and model within ``ram``, what is not known yet or all of it ``again``."""
        say = progress or (lambda _: None)
        say("disk")
        reader = RowReader(self.directory.rows)
        try:
            self.disk = disk_speed.disk_speed(reader, self.model.parts, again)
        finally:
            reader.close()
        self.trial = run_trial(self.model, ram, self.disk, again, progress)

    def view(self, ram: int | str, warm: int | None = None, count: int | None = None) -> View:
        """Plan and forecast for a budget, or why there is none.

        Args:
            warm, count: tokens decoded before, and then; see ``forecast.forecast``.
        """
        ram = parse_ram(ram)
        view = View(ram)
        try:
            view.plan = self.plan(ram)
        except BudgetError as error:
            view.reason = str(error).splitlines()[0].rstrip(":")
            return view
        if view.plan.slots and "paged" not in self.trial.ways:
            view.reason = "not measured: the budget given has no room to read rows as they fire"
        elif view.plan.streamed and "streamed" not in self.trial.ways:
            view.reason = "not measured: the budget given has no room to stream layers"
        elif self.disk is None or not self.trial.ways:
            view.reason = "not measured"
        else:
            view.forecast = self._forecast(view.plan, warm, count)
        return view

    @property
    def _curves(self) -> tuple[tuple[float, ...], ...] | None:
        return self.needs.paging.curves if self.needs.paging else None

    @property
    def uses_curves(self) -> bool:
        """Whether misses are taken from what calibration measured, not from the trial run."""
        return self._curves is not None and self.options.policy == DEFAULT_POLICY

    def _forecast(self, plan: Plan, warm: int | None, count: int | None) -> Forecast:
        how = {} if count is None else {"count": count}
        curves = self._curves if self.uses_curves and warm is None else None
        if self.disk is None:
            raise ValueError("nothing was measured")
        return forecast(
            plan, self.layers, self.disk, self.trial, self.options.policy,
            warm=warm, curves=curves, **how,
        )  # fmt: skip

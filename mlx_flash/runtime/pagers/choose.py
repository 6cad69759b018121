"""The pager for a model directory."""

from __future__ import annotations

from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging.counters import Counters
from mlx_flash.predictors.selection import Selection
from mlx_flash.storage.reader import RowReader

from ..memory_plan import Plan
from .base import Pager, Policies
from .experts import ExpertPager
from .layers import LayerPager
from .neurons import NeuronPager


def make_pager(
    directory: ModelDirectory,
    plan: Plan,
    reader: RowReader,
    counters: Counters,
    selection: Selection | None,
    policies: Policies,
    lookahead: bool,
) -> Pager:
    """The pager for the unit of a directory's rows."""
    if directory.unit == "neuron":
        return NeuronPager(directory, plan, reader, counters, selection, policies, lookahead)
    if directory.unit == "layer":
        return LayerPager(directory, plan, reader, counters)
    return ExpertPager(directory, plan, reader, counters, policies, lookahead)

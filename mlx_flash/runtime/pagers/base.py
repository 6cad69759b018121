"""What every pager offers and shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.paging.counters import Counters
from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.policies import Policy
from mlx_flash.paging.row_stream import RowStream
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.storage.reader import RowReader

from ..memory_plan import Plan

Policies = Callable[[int], Policy]  # rows of a layer -> a policy for its slots


class Pager(Protocol):
    """The paged FFNs of one model."""

    stream: LayerStream | None
    rows: RowStream | None
    caches: dict[int, RowCache]
    partial: bool  # weights of layers that are not kept are left out, not placeholders

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(path, module) of each layer of the row file; modules are made ready for loading."""

    def kept(self, layer: int) -> dict[str, mx.array]:
        """Weights of a layer by their names in its module, read now."""

    def missing(self, layer: int) -> dict[str, mx.array]:
        """Arrays of the names and shapes of ``kept``, never to be evaluated."""

    def start(self) -> dict[str, nn.Module]:
        """Path -> module to put there; called once weights are loaded."""


class BasePager:
    """What all pagers share: see ``Pager``, of which each of them adds the rest."""

    def __init__(
        self, directory: ModelDirectory, plan: Plan, reader: RowReader, counters: Counters
    ) -> None:
        self.directory, self.plan, self.reader = directory, plan, reader
        self.counters = counters
        self.stream: LayerStream | None = None
        self.rows: RowStream | None = None
        self.caches: dict[int, RowCache] = {}
        self.found: list[tuple[str, nn.Module]] = []

    def _placeholders(self, layer: int) -> dict[str, mx.array]:
        """Part -> an array of the shape and type that a layer's rows have, never evaluated."""
        extent = self.directory.rows.layers[layer]
        return {
            part.name: mx.zeros((extent.rows, *part.shape), DTYPES[part.dtype])
            for part in extent.layout.parts
        }

    def _check(self, found: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
        layers = len(self.directory.rows.layers)
        if len(found) != layers:
            raise ModelError(
                f"{self.directory.path}: the config makes {len(found)} layers, the row file has "
                f"{layers}"
            )
        self.found = found
        return found

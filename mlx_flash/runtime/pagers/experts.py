"""Rows are experts."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import mixtures
from mlx_flash.paging.counters import Counters
from mlx_flash.paging.expert_switch import FlashSwitch
from mlx_flash.paging.prefetch import LEAST_RIGHT, AccuracyGate, Prefetcher, best_experts
from mlx_flash.paging.row_stream import RowStream
from mlx_flash.paging.row_weights import whole_layer
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.storage.reader import RowReader

from ..memory_plan import Plan
from .base import BasePager, Policies


class ExpertPager(BasePager):
    """Rows are experts: a layer's experts are kept, all of them, or come to slots as needed.

    Args:
        policies: experts of a layer -> a policy for its slots.
        lookahead: prefetch what the next layer's router would choose.
    """

    partial = False

    def __init__(
        self,
        directory: ModelDirectory,
        plan: Plan,
        reader: RowReader,
        counters: Counters,
        policies: Policies,
        lookahead: bool,
    ) -> None:
        super().__init__(directory, plan, reader, counters)
        self._policies, self._lookahead = policies, lookahead
        self._layers: list[nn.Module] = []

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """See ``Pager``."""
        mixture = self.directory.mixture
        if mixture is None:
            raise ModelError(f"{self.directory.path} has rows of experts, but is no mixture")
        places = mixtures.modules(model, mixture)
        self._layers = [model.layers[index] for index, _, _ in places]
        return self._check([(path, module) for _, path, module in places])

    def kept(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        return whole_layer(self.reader, layer).arrays

    def missing(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        return self._placeholders(layer)

    def start(self) -> dict[str, nn.Module]:
        """See ``Pager``."""
        if not self.plan.slots:
            return {}
        layers = self.directory.rows.layers
        most = max(layers[i].rows for i in self.plan.slots)
        self.rows = RowStream(self.reader, most, unpadded=True, counters=self.counters)
        switches: dict[int, FlashSwitch] = {}
        for i, slots in self.plan.slots.items():
            policy = self._policies(layers[i].rows)
            self.caches[i] = RowCache(
                self.reader, i, slots, policy, unpadded=True, counters=self.counters
            )
            module = self.found[i][1]
            switches[i] = FlashSwitch(module, self.caches[i], self.rows, self.counters)
        for i, switch in switches.items():
            if self._lookahead and i + 1 in switches:
                switch.prefetcher = self._prefetcher(i + 1)
        return {self.found[i][0]: switch for i, switch in switches.items()}

    def scores(self, layer: int) -> Callable[[mx.array], mx.array] | None:
        """What scores a layer's experts by the input of the layer before's experts.

        None where its router sees another hidden state.
        """
        directory, mixture = self.directory, self.directory.mixture
        scores = mixtures.router_of(self._layers[layer], mixture) if mixture else None
        width = directory.config.get("hidden_size", directory.d_model)
        if scores is None or directory.d_model != width:
            return None
        experts = directory.rows.layers[layer].rows
        return lambda x: scores(x)[..., :experts]

    def _prefetcher(self, layer: int) -> Prefetcher | None:
        """Of a layer's experts; None where they cannot be predicted."""
        directory, scores = self.directory, self.scores(layer)
        if scores is None or directory.mixture is None:
            return None
        _, top_k = mixtures.expert_counts(directory.config, directory.mixture)

        def predict(hidden: mx.array) -> mx.array:
            return best_experts(scores(hidden), top_k)

        gate = AccuracyGate(LEAST_RIGHT["expert"])
        return Prefetcher(predict, self.caches[layer].prefetch, gate)

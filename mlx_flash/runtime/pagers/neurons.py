"""Rows are neurons."""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.models.families import projections
from mlx_flash.models.quantized_rows import without
from mlx_flash.paging.counters import Counters
from mlx_flash.paging.gather_strategies import (
    PrefetchedGather,
    RowFfn,
    Streamed,
    choose_strategy,
)
from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.prefetch import LEAST_RIGHT, AccuracyGate, Prefetcher, rows_beside
from mlx_flash.paging.row_linear import PackedRows, use_rows
from mlx_flash.paging.row_stream import RowStream
from mlx_flash.paging.row_weights import (
    dense_weights,
    placeholders,
    resident_projection,
    whole_layer,
)
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.paging.sparse_ffn import SparseMLP
from mlx_flash.paging.streamed_ffn import FlashMLP
from mlx_flash.predictors.predictor import Predictor
from mlx_flash.predictors.selection import Selection
from mlx_flash.storage.reader import RowReader

from ..memory_plan import Plan
from ..memory_requirements import BUFFERS
from .base import BasePager, Policies


class NeuronPager(BasePager):
    """Rows are neurons: of layers that are not kept whole rows or single ones are read.

    Args:
        selection: predictors of the rows that fire; None where whole layers are streamed.
        policies: rows of a layer -> a policy for its slots.
        lookahead: prefetch what the next layer's predictor names, where predictors are not exact.
    """

    partial = True

    def __init__(
        self,
        directory: ModelDirectory,
        plan: Plan,
        reader: RowReader,
        counters: Counters,
        selection: Selection | None,
        policies: Policies,
        lookahead: bool,
    ) -> None:
        super().__init__(directory, plan, reader, counters)
        self.selection, self._policies, self._lookahead = selection, policies, lookahead

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """See ``Pager``."""
        ffn, scheme = self.directory.ffn, self.directory.scheme
        found = self._check(families.modules(model, ffn))
        for i in (*self.plan.streamed, *self.plan.slots):
            use_rows(found[i][1], ffn)
        if scheme:
            for i in self.plan.kept:
                module = found[i][1]
                module[ffn.down] = PackedRows(module[ffn.down], scheme)
        return found

    def kept(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        if self.directory.scheme is None:
            weights = dense_weights(self.reader, layer, self.directory.ffn)
            return {f"{name}.weight": weight for name, weight in weights.items()}
        memory = whole_layer(self.reader, layer)
        return {self._name(part): array for part, array in memory.arrays.items()}

    def missing(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        if self.directory.scheme is None:
            weights = placeholders(self.directory.rows, layer, self.directory.ffn)
            return {f"{name}.weight": weight for name, weight in weights.items()}
        return {self._name(part): zeros for part, zeros in self._placeholders(layer).items()}

    def _name(self, part: str) -> str:
        """Of a packed part in its module: gate.scales is gate_proj.scales there."""
        base, _, suffix = part.partition(".")
        return f"{projections(self.directory.ffn)[base]}.{suffix or 'weight'}"

    def start(self) -> dict[str, nn.Module]:
        """See ``Pager``."""
        directory, plan, reader = self.directory, self.plan, self.reader
        ffn, scheme, layers = directory.ffn, directory.scheme, directory.rows.layers
        paged: dict[str, nn.Module] = {}
        if plan.streamed:
            self.stream = LayerStream(reader, plan.streamed, BUFFERS, counters=self.counters)
            for i in plan.streamed:
                path, module = self.found[i]
                paged[path] = FlashMLP(module, ffn, i, self.stream, scheme)
        if plan.slots and self.selection:
            names = [part.name for part in directory.rows.layout.parts]
            parts = without(names, self.selection.provides)
            most = max(layers[i].rows for i in plan.slots)
            self.rows = RowStream(reader, most, parts, counters=self.counters)
            sparse = {i: self._sparse(i, self.selection, self.rows, parts) for i in plan.slots}
            if self._lookahead:
                self._set_prefetchers(sparse, self.rows)
            paged |= {self.found[i][0]: mlp for i, mlp in sparse.items()}
        return paged

    def _sparse(
        self, layer: int, selection: Selection, stream: RowStream, parts: list[str]
    ) -> SparseMLP:
        directory = self.directory
        predictor = self._predictor(selection, layer)
        policy = self._policies(directory.rows.layers[layer].rows)
        cache = self.caches[layer] = RowCache(
            self.reader, layer, self.plan.slots[layer], policy, parts=parts, counters=self.counters
        )
        rows = RowFfn(self.found[layer][1], directory.ffn, directory.scheme)
        gather = choose_strategy(rows, predictor, cache, stream)
        return SparseMLP(rows, predictor, cache, gather, Streamed(rows, predictor, cache, stream))

    def _set_prefetchers(self, sparse: dict[int, SparseMLP], stream: RowStream) -> None:
        """Have each layer bring rows for the next one, where both take prefetched rows."""
        for i, mlp in sparse.items():
            following = sparse.get(i + 1)
            if following is None or not isinstance(following.gather, PrefetchedGather):
                continue
            if isinstance(mlp.gather, PrefetchedGather):
                predict = rows_beside(following.predictor)
                sink = functools.partial(stream.prefetch, self.caches[i + 1])
                gate = AccuracyGate(LEAST_RIGHT["neuron"])
                mlp.gather.prefetcher = Prefetcher(predict, sink, gate)

    def _predictor(self, selection: Selection, layer: int) -> Predictor:
        ffn, projection = self.directory.ffn, None
        if part := selection.provides:
            module, scheme = self.found[layer][1], self.directory.scheme
            projection = resident_projection(self.reader, layer, part, module, ffn, scheme)
        rows = self.directory.rows.layers[layer].rows
        return selection.layers[layer].build(ffn, rows, projection)

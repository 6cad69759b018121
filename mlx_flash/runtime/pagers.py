"""What of a model's FFNs is put in place of mlx-lm's modules, for each unit of rows.

A pager says where the FFNs are, which weights they are loaded with, and which modules stand in for
those whose rows are not kept. Kept layers are mlx-lm's own modules with weights read from the row
file.

Knows: one model directory, its plan. Does not know: how a model is loaded or called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families, mixtures
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.models.families import projections
from mlx_flash.models.quantized_rows import without
from mlx_flash.paging.expert_switch import FlashSwitch
from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.policies import Policy
from mlx_flash.paging.prefetch import Foresight, Lookahead
from mlx_flash.paging.row_linear import PackedRows, use_rows
from mlx_flash.paging.row_stream import RowStream
from mlx_flash.paging.row_weights import (
    dense_weights,
    first_row,
    placeholders,
    resident_projection,
    whole_layer,
)
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.paging.sparse_ffn import SparseMLP, SparseStats
from mlx_flash.paging.streamed_ffn import FlashLayer, FlashMLP
from mlx_flash.predictors.predictor import Predictor
from mlx_flash.predictors.selection import Selection
from mlx_flash.storage.reader import RowReader

from .memory_plan import BUFFERS, Plan

Policies = Callable[[int], Policy]


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


class _Pager:
    def __init__(
        self, directory: ModelDirectory, plan: Plan, reader: RowReader, stats: SparseStats
    ) -> None:
        self.directory, self.plan, self.reader, self.stats = directory, plan, reader, stats
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


class NeuronPager(_Pager):
    """Rows are neurons: of layers that are not kept whole rows or single ones are read.

    Args:
        selection: predictors of the rows that fire; None where whole layers are streamed.
        policies: rows of a layer -> a policy for its slots.
        lookahead: bring what the next layer's predictor names before its turn, where predictors
            are not exact.
    """

    partial = True

    def __init__(
        self,
        directory: ModelDirectory,
        plan: Plan,
        reader: RowReader,
        stats: SparseStats,
        selection: Selection | None,
        policies: Policies,
        lookahead: bool,
    ) -> None:
        super().__init__(directory, plan, reader, stats)
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
            self.stream = LayerStream(reader, plan.streamed, BUFFERS)
            for i in plan.streamed:
                path, module = self.found[i]
                paged[path] = FlashMLP(module, ffn, i, self.stream, scheme)
        if plan.slots and self.selection:
            names = [part.name for part in directory.rows.layout.parts]
            parts = without(names, self.selection.provides)
            self.rows = RowStream(reader, max(layers[i].rows for i in plan.slots), parts)
            before: SparseMLP | None = None
            for i, slots in plan.slots.items():
                path, module = self.found[i]
                predictor = self._predictor(self.selection, i)
                policy = self._policies(layers[i].rows)
                cache = RowCache(reader, i, slots, policy, parts=parts)
                mlp = SparseMLP(module, ffn, predictor, cache, self.rows, self.stats, scheme)
                if self._lookahead and before and before.layer == i - 1 and mlp.in_any_order:
                    before.foresee(Foresight(predictor, cache, self.rows))
                self.caches[i], paged[path], before = cache, mlp, mlp
        return paged

    def _predictor(self, selection: Selection, layer: int) -> Predictor:
        ffn, projection = self.directory.ffn, None
        if part := selection.provides:
            module, scheme = self.found[layer][1], self.directory.scheme
            projection = resident_projection(self.reader, layer, part, module, ffn, scheme)
        rows = self.directory.rows.layers[layer].rows
        return selection.layers[layer].build(ffn, rows, projection)


class LayerPager(_Pager):
    """A row is a layer's FFN as mlx-lm holds it: layers are kept or streamed whole."""

    partial = False

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """See ``Pager``."""
        return self._check(families.modules(model, self.directory.ffn))

    def kept(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        return first_row(whole_layer(self.reader, layer))

    def missing(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        return {part: zeros.squeeze(0) for part, zeros in self._placeholders(layer).items()}

    def start(self) -> dict[str, nn.Module]:
        """See ``Pager``."""
        if not self.plan.streamed:
            return {}
        self.stream = LayerStream(self.reader, self.plan.streamed, BUFFERS, exact=True)
        return {
            self.found[i][0]: FlashLayer(self.found[i][1], i, self.stream)
            for i in self.plan.streamed
        }


class ExpertPager(_Pager):
    """Rows are experts: a layer's experts are kept, all of them, or come to slots as needed.

    Args:
        policies: experts of a layer -> a policy for its slots.
        lookahead: read ahead what the next layer's router would choose.
    """

    partial = False

    def __init__(
        self,
        directory: ModelDirectory,
        plan: Plan,
        reader: RowReader,
        stats: SparseStats,
        policies: Policies,
        lookahead: bool,
    ) -> None:
        super().__init__(directory, plan, reader, stats)
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
        self.rows = RowStream(self.reader, most, exact=True)
        paged: dict[str, nn.Module] = {}
        before: tuple[int, FlashSwitch] | None = None
        for i, slots in self.plan.slots.items():
            path, module = self.found[i]
            policy = self._policies(layers[i].rows)
            self.caches[i] = RowCache(self.reader, i, slots, policy, exact=True)
            switch = FlashSwitch(module, self.caches[i], self.rows, self.stats)
            if before and before[0] == i - 1 and self._lookahead:
                before[1].ahead(self._ahead(i))
            paged[path] = switch
            before = i, switch
        return paged

    def scores(self, layer: int) -> Callable[[mx.array], mx.array] | None:
        """What scores a layer's experts by what the layer before is given, see ``Lookahead``.

        None where its router sees another hidden state.
        """
        directory, mixture = self.directory, self.directory.mixture
        scores = mixtures.router_of(self._layers[layer], mixture) if mixture else None
        width = directory.config.get("hidden_size", directory.d_model)
        if scores is None or directory.d_model != width:
            return None
        experts = directory.rows.layers[layer].rows
        return lambda x: scores(x)[..., :experts]

    def _ahead(self, layer: int) -> Lookahead | None:
        directory, scores = self.directory, self.scores(layer)
        if scores is None or directory.mixture is None:
            return None
        _, top_k = mixtures.expert_counts(directory.config, directory.mixture)
        return Lookahead(scores, self.caches[layer], top_k)


def check_back_end(directory: ModelDirectory) -> None:
    """Raise ModelError where MLX cannot compute a directory's experts.

    Its CPU back end has ``gather_mm`` for float32 only, and says so in the middle of a token.
    """
    if directory.unit != "expert" or mx.default_device().type != mx.DeviceType.cpu:
        return
    types = {
        part.dtype
        for layout in directory.rows.layouts
        for part in layout.parts
        if part.name.endswith(".weight") and part.dtype != "U32"  # that is packed
    }
    if types - {"F32"}:
        raise ModelError(
            f"{directory.path} has experts in {' and '.join(sorted(types))}, and MLX's CPU back "
            "end computes them in float32 only; convert with --dtype float32, or quantised (-q)"
        )


def slow_back_end(directory: ModelDirectory) -> str:
    """What to tell a user whose quantised model MLX's CPU back end computes slowly; else empty."""
    packed = "quantization" in directory.config
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if not packed or not on_cpu or directory.dtype == mx.float32:
        return ""
    return (
        f"{directory.path} is quantised and computes in {str(directory.dtype).rpartition('.')[2]}, "
        "which takes MLX's CPU back end some 8 to 40 times as long as float32; for this machine "
        "convert with --dtype float32"
    )


def make_pager(
    directory: ModelDirectory,
    plan: Plan,
    reader: RowReader,
    stats: SparseStats,
    selection: Selection | None,
    policies: Policies,
    lookahead: bool,
) -> Pager:
    """The pager for the unit of a directory's rows."""
    if directory.unit == "neuron":
        return NeuronPager(directory, plan, reader, stats, selection, policies, lookahead)
    if directory.unit == "layer":
        return LayerPager(directory, plan, reader, stats)
    return ExpertPager(directory, plan, reader, stats, policies, lookahead)

"""How many bytes each use of memory takes, for one model directory; the model is not loaded.

Knows: sizes of files and rows, how much working memory a prompt chunk takes (an estimate from
above; a test compares it with MLX's own figures). Does not know: what a budget is spent on.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_flash.common.platform import current_platform
from mlx_flash.model_directory import expert_demand_file
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import mixtures
from mlx_flash.models.quantized_rows import without
from mlx_flash.paging import flash_embedding
from mlx_flash.paging.row_stream import chunk_rows
from mlx_flash.paging.row_weights import CHUNK_BYTES
from mlx_flash.paging.slots.slot_memory import slot_bytes
from mlx_flash.predictors.selection import Selection
from mlx_flash.storage.reader import RowReader

from .cache_limit import MLX_CACHE
from .kv_policy import LONGEST_CHUNK, make_kv_policy
from .options import PagingOptions
from .slot_allocation import allocate_slots

BUFFERS = 2  # of layers that are streamed
DEFAULT_CONTEXT = 2048
LEAST_SHARE = 50  # a layer's cache holds at least 1/50 of its rows
MIN_STEP = 16
RESIDENT_STEP = 128
MAX_STEP = LONGEST_CHUNK
SLACK = 20 << 20
SLACK_SHARE = 0.02  # of the resident weights: allocators round up
ROWS_SLACK_SHARE = 0.005  # of the rows, which are few large arrays


@dataclass(frozen=True)
class MemoryRequirements:
    """Sizes in bytes of all that must be in memory.

    Args:
        process: interpreter, libraries, tokenizer: what is resident before the model is.
        resident: weights that always stay.
        kv_cache: for ``context`` tokens.
        context: tokens.
        reader: staging buffers of the row reader.
        slack: what allocators and late imports may add.
        layers: FFN weights of each layer, as kept for good.
        buffer: one streaming buffer.
        buffers: number of streaming buffers.
        workspace: tokens of a prompt chunk -> working memory that it takes; must not fall.
        lookup: the part of ``resident`` that is an embedding which may stay on flash.
        paging: what reading single rows takes; None where nothing names the rows that are needed.
    """

    process: int
    resident: int
    kv_cache: int
    context: int
    reader: int
    slack: int
    layers: tuple[int, ...]
    buffer: int
    buffers: int
    workspace: Callable[[int], int]
    lookup: int = 0
    paging: PagingRequirements | None = None

    @property
    def fixed(self) -> int:
        """What every way of running the model takes, chunks and reader not counted."""
        return self.process + self.resident - self.lookup + self.kv_cache + self.slack

    @property
    def dense(self) -> int:
        """The budget from which on every row is kept."""
        held = self.fixed + self.lookup + sum(self.layers)
        return held + self.reader + self.workspace(self.resident_step)

    @property
    def small(self) -> bool:
        """Whether streaming buffers would take as much as all layers."""
        held = sum(self.layers) + self.lookup
        return len(self.layers) <= self.buffers or held <= self.buffers * self.buffer

    @property
    def max_step(self) -> int:
        """Tokens of the longest prompt chunk."""
        return min(MAX_STEP, max(1, self.context))

    @property
    def min_step(self) -> int:
        """Tokens of the shortest prompt chunk."""
        return min(MIN_STEP, self.max_step)

    @property
    def resident_step(self) -> int:
        """Tokens of a chunk that is long enough where nothing is read for it."""
        return min(RESIDENT_STEP, self.max_step)

    def replace(self, **changes: Any) -> MemoryRequirements:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class PagingRequirements:
    """What it takes to read only the rows that are needed; bytes where nothing else is said.

    Args:
        predictors: of each layer.
        slots: of each layer, memory that one cached row takes.
        rows: number of rows of each layer.
        demand: of each layer, relative demand for cached rows; slots are shared out in this
            proportion.
        buffers: for rows that find no slot, and for prompts.
        experts: rows are the experts of a mixture, and its router names them; else they are
            neurons, and predictors name them.
        curves: of each layer, misses per token with 0, 1, ... cached rows, as measured; where they
            are given slots go where they save most, and ``demand`` does not count.
    """

    predictors: tuple[int, ...]
    slots: tuple[int, ...]
    rows: tuple[int, ...]
    demand: tuple[float, ...]
    buffers: int
    experts: bool = False
    curves: tuple[tuple[float, ...], ...] | None = None

    @property
    def least_slots(self) -> tuple[int, ...]:
        """The fewest cached rows of each layer; with fewer, most rows would be read every time."""
        return tuple(-(-rows // LEAST_SHARE) for rows in self.rows)

    def streams_too(self, predictor: str) -> bool:
        """Whether layers are streamed whole where a budget is too small for ``predictor``."""
        return predictor == "auto" and not self.experts

    def bytes_of(self, capacities: Sequence[int]) -> int:
        """Memory for as many cached rows of each layer."""
        return sum(n * size for n, size in zip(capacities, self.slots, strict=True))

    def capacities(self, room: int) -> tuple[int, ...]:
        """Cached rows of each layer that fit into ``room`` bytes, but never below the fewest.

        By measured curves, so that misses are fewest, else in proportion to demand.
        """
        if self.curves is not None:
            return allocate_slots(self.curves, self.slots, self.least_slots, room)
        low, high = 0.0, max(r / max(d, 1e-9) for r, d in zip(self.rows, self.demand, strict=True))
        for _ in range(64):
            middle = (low + high) / 2
            if self.bytes_of(self._at(middle)) <= room:
                low = middle
            else:
                high = middle
        return self._at(low)

    def _at(self, factor: float) -> tuple[int, ...]:
        return tuple(
            min(rows, max(least, int(factor * demand)))
            for rows, least, demand in zip(self.rows, self.least_slots, self.demand, strict=True)
        )


def memory_requirements(
    directory: ModelDirectory,
    reader: RowReader,
    options: PagingOptions | None = None,
    selection: Selection | None = None,
) -> MemoryRequirements:
    """What the model in a directory needs, run as the options say; nothing is loaded.

    Args:
        selection: predictors of the rows that fire; None reads whole layers, or experts.
    """
    options = options or PagingOptions()
    context = options.context or default_context(directory)
    layers = directory.rows.layers
    kv_cache = make_kv_policy(options.kv, directory).bytes(context)
    gc.collect()  # what a closed model held goes to MLX's cache first
    mx.clear_cache()
    system = current_platform()
    system.trim()
    resident = sum(file.stat().st_size for file in directory.shards)
    weights = tuple(layer.rows * layer.layout.ideal_bytes for layer in layers)
    widest = max(layer.rows * slot_bytes(layer.layout) for layer in layers)
    paging = None
    if selection or (directory.mixture and options.use_flash):
        measured = options.predictor != "none"
        curves = expert_demand_file.curves_of(directory) if measured else None
        paging = paging_requirements(directory, selection, curves)
    return MemoryRequirements(
        process=system.process_bytes(),
        resident=resident,
        kv_cache=kv_cache,
        context=context,
        reader=reader.overhead_bytes + CHUNK_BYTES,
        slack=SLACK + int(SLACK_SHARE * resident + ROWS_SLACK_SHARE * sum(weights)),
        layers=weights,
        buffer=widest,
        buffers=min(BUFFERS, len(layers)),
        workspace=functools.partial(_workspace, directory, context),
        lookup=table.nbytes if (table := flash_embedding.find(directory)) else 0,
        paging=paging,
    )


def default_context(directory: ModelDirectory) -> int:
    """Tokens that the KV cache is planned for where nobody says."""
    return min(DEFAULT_CONTEXT, directory.positions or DEFAULT_CONTEXT)


def paging_requirements(
    directory: ModelDirectory,
    selection: Selection | None,
    curves: tuple[tuple[float, ...], ...] | None = None,
) -> PagingRequirements:
    """What it takes to read the rows that the selected predictors name, or a mixture's experts.

    Args:
        curves: see ``PagingRequirements``.
    """
    layers = directory.rows.layers
    rows = tuple(layer.rows for layer in layers)
    provided = selection.provides if selection else None
    slots = tuple(
        slot_bytes(layer.layout, without([p.name for p in layer.layout.parts], provided))
        for layer in layers
    )
    buffer = max(
        chunk_rows(layer.layout.stride, max(rows)) * size
        for layer, size in zip(layers, slots, strict=True)
    )
    return PagingRequirements(
        predictors=selection.nbytes if selection else (0,) * len(layers),
        slots=slots,
        rows=rows,
        demand=selection.demand if selection else rows,
        buffers=2 * buffer,
        experts=directory.mixture is not None,
        curves=curves,
    )


def _workspace(directory: ModelDirectory, context: int, step: int) -> int:
    """Bytes that computing ``step`` tokens takes besides what is kept, from above."""
    config, d_model = directory.config, directory.d_model
    text = config.get("text_config") or config
    item = directory.dtype.size
    heads = text.get("num_attention_heads") or text.get("n_head") or d_model // 64
    vocab = text.get("vocab_size", 0)
    attention = 4 * heads * step * (context + step) * item
    wide = 4 * directory.d_ffn + 12 * d_model
    if directory.mixture:  # every token once for each of its experts
        _, top_k = mixtures.expert_counts(config, directory.mixture)
        wide = top_k * (4 * directory.d_ffn + 6 * d_model) + wide
    head = vocab * (item + 5 * 4)
    return attention + step * wide * item + head + MLX_CACHE

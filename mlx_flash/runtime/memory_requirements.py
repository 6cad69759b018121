"""What a model in a directory takes of memory, by size; nothing of it is loaded.

Knows: mlx-lm's caches, how much working memory a prompt chunk takes (an estimate from above, held
against MLX's own figures by a test). Does not know: what a budget is spent on (``budget``).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.common.platform import current_platform
from mlx_flash.errors import FlashError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import mixtures
from mlx_flash.models.quantized_rows import without
from mlx_flash.models.registry import make_model
from mlx_flash.paging import flash_embedding
from mlx_flash.paging.row_stream import chunk_rows
from mlx_flash.paging.row_weights import CHUNK_BYTES
from mlx_flash.paging.slots.slot_memory import slot_bytes
from mlx_flash.predictors.selection import Selection
from mlx_flash.storage.reader import RowReader

from .memory_plan import BUFFERS, MAX_STEP, MemoryRequirements, PagingRequirements

DEFAULT_CONTEXT = 2048
KV_STEP = 256  # mlx-lm's KV caches grow by so many tokens
MLX_CACHE = 8 << 20  # bytes that MLX may hold on to for reuse
SLACK = 20 << 20
SLACK_SHARE = 0.02  # of the resident weights: allocators round up
ROWS_SLACK_SHARE = 0.005  # of the rows, which are few large arrays


@contextmanager
def foreign_errors(
    directory: ModelDirectory, what: str = "its config.json or weights"
) -> Iterator[None]:
    """The files drive mlx-lm's code, which may fail in any way: name the directory."""
    try:
        yield
    except (FlashError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{directory.path} cannot be loaded, {what} were changed: "
            f"{type(error).__name__}: {error}; convert the model again"
        ) from error


def memory_requirements(
    directory: ModelDirectory, reader: RowReader, context: int | None = None
) -> MemoryRequirements:
    """What the model in a directory needs, by size; nothing is loaded."""
    if context is None:
        context = min(DEFAULT_CONTEXT, directory.config.get("max_position_embeddings") or 2**31)
    layers = directory.rows.layers
    kv_cache = kv_bytes(directory, context)
    gc.collect()  # what a closed model held goes to MLX's cache first
    mx.clear_cache()
    system = current_platform()
    system.trim()
    resident = sum(file.stat().st_size for file in directory.shards)
    weights = tuple(layer.rows * layer.layout.ideal_bytes for layer in layers)
    widest = max(layer.rows * slot_bytes(layer.layout) for layer in layers)
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
    )


def paging_requirements(
    directory: ModelDirectory,
    selection: Selection | None,
    curves: tuple[tuple[float, ...], ...] | None = None,
) -> PagingRequirements:
    """What it takes to page the rows that the selected predictors name, or a mixture's experts.

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
        unit="experts" if directory.mixture else "FFN rows",
        curves=curves,
    )


def kv_bytes(directory: ModelDirectory, context: int) -> int:
    """Bytes of the KV cache for ``context`` tokens.

    A forward pass of one token is built but never evaluated; the shapes of its caches tell.
    """
    with foreign_errors(directory):
        model = make_model(directory.config)
        model.set_dtype(directory.dtype)
        cache = make_prompt_cache(model)
        model(mx.zeros((1, 1), mx.int32), cache=cache)
    sizes = [_cache_bytes(leaf, context) for leaf in _leaves(cache)]
    return sum(sizes) + max(sizes, default=0)  # a layer's cache is copied as it grows


def _cache_bytes(leaf: Any, context: int) -> int:
    keys = getattr(leaf, "keys", None)
    if not isinstance(keys, mx.array) or keys.ndim != 4:
        return sum(a.nbytes for _, a in tree_flatten(leaf.state) if isinstance(a, mx.array))
    tokens = (context // KV_STEP + 1) * KV_STEP
    if window := getattr(leaf, "max_size", None):
        tokens = min(tokens, window + MAX_STEP)  # a chunk goes in before the window is cut
    return tokens * sum(a.nbytes // a.shape[2] for a in (keys, leaf.values))


def _leaves(cache: Any) -> Iterator[Any]:
    """The caches of a prompt cache, those inside a CacheList one by one."""
    for entry in cache or ():
        inner = getattr(entry, "caches", None)
        yield from _leaves(inner) if inner is not None else (entry,)


def tokens_in(cache: Any) -> int:
    """Tokens in a prompt cache; of a batch, in its longest row."""
    for leaf in _leaves(cache):
        offset = getattr(leaf, "offset", None)
        if isinstance(offset, int):
            return offset
        if isinstance(offset, mx.array):
            return max(0, int(offset.max().item()))
    return 0


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

"""What pages a loaded model: the attribute ``flash`` of the model."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_flash.common.sizes import show
from mlx_flash.errors import BudgetError, FlashWarning
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.bounded_embedding import bound_embeddings
from mlx_flash.paging import flash_embedding
from mlx_flash.paging.counters import Counters
from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.policies import make_policy
from mlx_flash.paging.row_stream import RowStream
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.predictors.selection import Selection
from mlx_flash.storage.reader import ReadStats, RowReader

from .cache_limit import limit_cache
from .kv_policy import make_kv_policy, tokens_seen
from .memory_plan import Plan
from .options import PagingOptions
from .pagers.choose import make_pager
from .retained_caches import RetainedCaches
from .unaffordable_logits import UnaffordableLogits

# Whether to read ahead by default: see benchmarks/speed/sparse_speed.py, benchmarks/mixture.
LOOKAHEAD = {"neuron": True, "expert": False, "layer": False}


@dataclasses.dataclass
class FlashStats(ReadStats):
    """The reader's counters and the model's since loading; subtract two of them for a span.

    Args:
        wait_seconds: that the calling thread waited for reading, while experts in slots may have
            been computed.
        hits, misses: rows found in memory, and rows that had to be read.
        forwards: calls of the model, prompt chunks included.
        foretold, useful: rows read ahead, and those of them that were then needed.
        predicted: rows that predictors or routers named, in ``layer_calls`` calls of layers.
        predict_seconds, manage_seconds: for naming them, and for bookkeeping of slots.
    """

    wait_seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    forwards: int = 0
    foretold: int = 0
    useful: int = 0
    predicted: int = 0
    layer_calls: int = 0
    predict_seconds: float = 0.0
    manage_seconds: float = 0.0


class PagedModel:
    """What pages a model's FFN: the attribute ``flash`` of a loaded model."""

    def __init__(
        self,
        directory: ModelDirectory,
        plan: Plan,
        reader: RowReader,
        options: PagingOptions,
        selection: Selection | None = None,
    ) -> None:
        self.directory = directory
        self.plan = plan
        self.reader = reader
        self.options = options
        self.selection = selection if plan.slots else None
        self.lookahead = _reads_ahead(directory, options)
        self._counters = Counters()
        policies = functools.partial(make_policy, options.policy)
        self.pager = make_pager(
            directory, plan, reader, self._counters, self.selection, policies, self.lookahead
        )
        self.kv = make_kv_policy(options.kv, directory)
        self.max_tokens: int | None = None
        self._retained = RetainedCaches()
        self._positions = directory.positions
        self._ram = 0
        self._release: Callable[[], object] = lambda: None
        self._forwards = 0
        self._embedding: flash_embedding.FlashEmbedding | None = None
        self._lock = threading.Lock()

    def limit(self, ram: int, context: int) -> None:
        """Refuse more than ``context`` tokens, and keep MLX's buffer cache small until ``close``.

        Args:
            ram: the budget in bytes that this is done for.
        """
        self._ram, self.max_tokens = ram, context
        self._release = limit_cache(self)

    @property
    def ffns(self) -> list[tuple[str, nn.Module]]:
        """(path, mlx-lm's module) of every layer of the row file."""
        return self.pager.found

    @property
    def stream(self) -> LayerStream | None:
        """What streams whole layers, where any are."""
        return self.pager.stream

    @property
    def rows(self) -> RowStream | None:
        """What brings rows that find no slot."""
        return self.pager.rows

    @property
    def caches(self) -> dict[int, RowCache]:
        """Layer -> its slots."""
        return self.pager.caches

    def stats(self) -> FlashStats:
        """The counters as they stand."""
        kept = sum(self.directory.rows.layers[i].rows for i in self.plan.kept)
        counted = dataclasses.asdict(self._counters)
        counted["hits"] += kept * self._forwards
        foretold, useful = counted.pop("prefetched"), counted.pop("prefetch_hits")
        return FlashStats(
            **dataclasses.asdict(self.reader.stats()),
            **counted,
            forwards=self._forwards,
            foretold=foretold,
            useful=useful,
        )

    def close(self) -> None:
        """Stop reading and let go of the row file; the model cannot be used after that."""
        if self.stream:
            self.stream.close()
        self.reader.close()
        if self._embedding is not None:
            self._embedding.close()
        self._release()

    def weights(
        self,
        resident: dict[str, mx.array],
        sanitize: Callable[[dict[str, mx.array]], Any],
    ) -> dict[str, mx.array]:
        """The resident weights and those of the layers that are kept, read now.

        The directory's weights are sanitised already, but mlx-lm's ``sanitize`` may also set the
        model up by what is among them (gemma3 ties its head), so it is shown every name, those
        that are paged as placeholders that nothing evaluates; what it returns is not used.
        """
        weights = dict(resident)
        left_out = set()
        for i, (path, _) in enumerate(self.ffns):
            kept = i in self.plan.kept
            found = self.pager.kept(i) if kept else self.pager.missing(i)
            found = {f"{path}.{name}": weight for name, weight in found.items()}
            weights |= found
            if self.pager.partial and not kept:
                left_out |= found.keys()
        sanitize(dict(weights))
        return {name: weight for name, weight in weights.items() if name not in left_out}

    def start(self, model: nn.Module) -> None:
        """Put the paged FFNs in place, then take the resident weights into memory."""
        modules = self.pager.start()
        if self.plan.lookup and (found := flash_embedding.find(self.directory)):
            self._embedding = modules[flash_embedding.PATH] = flash_embedding.FlashEmbedding(found)
        model.update_modules(tree_unflatten(list(modules.items())))
        bound_embeddings(model)
        mx.eval(model.parameters())

    def call(self, forward: Callable[..., Any], inputs: mx.array, cache: Any, extra: Any) -> Any:
        """Run the model, a prompt in chunks that the plan has memory for.

        One call at a time, under a lock: modules compute from rows that were bound to them for this
        call, see ``mlx_flash.paging``. A call without a cache, or with more than tokens and a
        cache, is not cut up. Logits of chunks that the budget has no room for are
        ``UnaffordableLogits``.
        """
        batch, length = inputs.shape[:2]
        step = max(1, self.plan.step // batch)
        whole = bool(extra) or not cache or length <= step
        if self.options.use_flash:  # else all was read, and the reader closed
            self.reader.check_usable()
        with self._lock:
            self._check_context(cache, batch, length, length if whole else step)
            seen = tokens_seen(cache) + length
            try:
                if whole:
                    outputs = [self._counted(forward, inputs, cache, extra)]
                else:
                    outputs = []
                    for start in range(0, length, step):
                        chunk = inputs[:, start : start + step]
                        outputs.append(self._counted(forward, chunk, cache, {}))
                        mx.eval([c.state for c in cache])
            except BaseException:
                if self.stream:
                    self.stream.close()
                raise
        self._look_at_positions(seen)
        return outputs[0] if whole else self._joined(outputs)

    def _joined(self, outputs: list[Any]) -> Any:
        """Logits of a prompt's chunks as one array, as far as the budget has room for it."""
        spare = self._ram - self.plan.total + self.plan.bytes_of("slack") // 2
        if self.max_tokens is not None and 2 * sum(o.nbytes for o in outputs) > spare:
            return UnaffordableLogits(outputs, self._ram)
        return mx.concatenate(outputs, axis=1)

    def _counted(
        self, forward: Callable[..., Any], inputs: mx.array, cache: Any, extra: Any
    ) -> Any:
        output = forward(inputs, cache=cache, **extra)
        self._forwards += 1
        if self.max_tokens is not None:
            self._retained.note(cache)
        return output

    def _look_at_positions(self, seen: int) -> None:
        """Warn, once, where a text has more tokens than the model was made for.

        Rotary positions go on beyond that, in worse text; tables of learned ones raise an error.
        """
        if self._positions and seen > self._positions:
            warnings.warn(
                f"{seen} tokens are more than the {self._positions} positions that "
                f"{self.directory.path} was made for; text gets worse from there on",
                FlashWarning,
                stacklevel=4,
            )
            self._positions = None

    def _check_context(self, cache: Any, batch: int, length: int, chunk: int) -> None:
        """Raise BudgetError where ``length`` more tokens would outgrow what is planned for."""
        if self.max_tokens is None:
            return
        tokens = batch * self.kv.held(cache, length, chunk)
        if tokens > self.max_tokens:
            raise BudgetError(
                f"{tokens} tokens are more than the context of {self.max_tokens} that the budget "
                f"of {show(self._ram)} was planned for; load with a larger context"
            )
        if (others := self._retained.others(cache)) and tokens + others > self.max_tokens:
            raise BudgetError(
                f"{tokens} tokens and {others} in prompt caches that are still held are more than "
                f"the context of {self.max_tokens} that the budget of {show(self._ram)} was "
                "planned for; let go of those caches, or load with a larger context"
            )


def _reads_ahead(directory: ModelDirectory, options: PagingOptions) -> bool:
    """Whether rows are read before the layer's turn; the sliding window leaves no room for them."""
    if options.lookahead is None:
        return LOOKAHEAD[directory.unit] and not make_policy(options.policy, 1).is_window
    return options.lookahead

"""A model directory to what mlx-lm's own generation takes: (model, tokenizer).

The model is the family's class (``architectures``) with the FFN of some layers replaced. Layers
whose rows are kept are its own modules with weights read from the row file; of the others the rows
that a predictor names are read, or, without predictors, whole layers are streamed. Nothing in
mlx_lm is patched.

Knows: mlx-lm's loading contract. Does not know: what things cost in memory (``needs``), the command
line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm import utils
from transformers import PreTrainedConfig

from . import embedding, expert_file, footprint, pagers
from .architectures import INVENTED, get_classes
from .budget import (
    Needs,
    Plan,
    check_machine,
    make_plan,
    make_sparse_plan,
    parse_ram,
    show,
    sparse_plan_of,
    split,
)
from .cache import RowCache
from .directory import ModelDirectory
from .errors import BudgetError, PredictorError
from .needs import MLX_CACHE, foreign_errors, needs_of, sparse_needs, tokens_in
from .policy import DEFAULT_POLICY, DEFAULT_WINDOW, Policy, SlidingWindow, make_policy
from .reader import ReadStats, RowReader
from .row_stream import RowStream
from .selection import Selection, select
from .sparse import SparseStats
from .stream import LayerStream

# Whether to read ahead by default: see benchmarks/sparse_speed.py and benchmarks/mixture.py.
LOOKAHEAD = {"neuron": True, "expert": False, "layer": False}


@dataclasses.dataclass
class FlashStats(ReadStats):
    """The reader's counters and the model's since loading; subtract two of them for a span.

    ``hits`` and ``misses`` count rows found in memory and rows that had to be read;
    ``wait_seconds`` is the time that the calling thread waited for reading, while experts in slots
    may have been computed; ``forwards`` counts calls of the model, prompt chunks included;
    ``foretold`` rows were read on a guess, ``useful`` of them then needed. Of layers whose rows
    are predicted: ``predicted`` rows, in ``layer_calls`` calls, ``predict_seconds`` for saying
    which, ``manage_seconds`` for bookkeeping.
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


class Flash:
    """What pages a model's FFN: the attribute ``flash`` of a loaded model."""

    def __init__(
        self,
        directory: ModelDirectory,
        plan: Plan,
        reader: RowReader,
        selection: Selection | None = None,
        policies: Callable[[int], Policy] = SlidingWindow,
        lookahead: bool = False,
    ) -> None:
        self.directory = directory
        self.plan = plan
        self.reader = reader
        self.selection = selection if plan.slots else None
        self.lookahead = lookahead
        self._sparse = SparseStats()
        self.pager = pagers.make_pager(
            directory, plan, reader, self._sparse, self.selection, policies, lookahead
        )
        self.max_tokens: int | None = None
        self._forwards = 0
        self._embedding: embedding.FlashEmbedding | None = None
        self._lock = threading.Lock()

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
        caches = self.caches.values()
        stats = FlashStats(
            **dataclasses.asdict(self.reader.stats()),
            wait_seconds=sum(cache.wait_seconds for cache in caches),
            hits=kept * self._forwards + sum(cache.hits for cache in caches),
            misses=sum(cache.misses for cache in caches),
            forwards=self._forwards,
            foretold=sum(cache.foretold for cache in caches),
            useful=sum(cache.useful for cache in caches),
            **dataclasses.asdict(self._sparse),
        )
        if self.stream:
            stats.wait_seconds += self.stream.wait_seconds
            stats.misses += self.stream.rows_acquired
        if self.rows:
            stats.wait_seconds += self.rows.wait_seconds
            stats.misses += self.rows.rows_read
        return stats

    def close(self) -> None:
        """Stop reading and let go of the row file; the model cannot be used after that."""
        if self.stream:
            self.stream.close()
        self.reader.close()
        if self._embedding is not None:
            self._embedding.close()

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
        if self.plan.lookup and (found := embedding.find(self.directory)):
            self._embedding = modules[embedding.PATH] = embedding.FlashEmbedding(found)
        model.update_modules(tree_unflatten(list(modules.items())))
        mx.eval(model.parameters())

    def call(self, forward: Callable[..., Any], inputs: mx.array, cache: Any, extra: Any) -> Any:
        """Run the model, a prompt in chunks that the plan has memory for.

        One thread at a time: buffers are filled for one forward pass. A call without a cache, or
        with more than tokens and a cache, is not cut up.
        """
        batch, length = inputs.shape[:2]
        step = max(1, self.plan.step // batch)
        with self._lock:
            self._check_context(cache, batch, length)
            try:
                if extra or not cache or length <= step:
                    return self._counted(forward, inputs, cache, extra)
                outputs = []
                for start in range(0, length, step):
                    chunk = inputs[:, start : start + step]
                    outputs.append(self._counted(forward, chunk, cache, {}))
                    mx.eval([c.state for c in cache])
            except BaseException:
                if self.stream:
                    self.stream.close()
                raise
        return mx.concatenate(outputs, axis=1)

    def _counted(
        self, forward: Callable[..., Any], inputs: mx.array, cache: Any, extra: Any
    ) -> Any:
        output = forward(inputs, cache=cache, **extra)
        self._forwards += 1
        return output

    def _check_context(self, cache: Any, batch: int, length: int) -> None:
        if self.max_tokens is None:
            return
        tokens = batch * (tokens_in(cache) + length)
        if tokens > self.max_tokens:
            raise BudgetError(
                f"{tokens} tokens are more than the context of {self.max_tokens} that the budget "
                f"of {show(self.plan.ram or 0)} was planned for; load with a larger context"
            )


def load(
    path: str | Path,
    ram: int | str | None = None,
    use_flash: bool = True,
    *,
    context: int | None = None,
    kept_share: float | None = None,
    predictor: str = "auto",
    policy: str = DEFAULT_POLICY,
    window: int = DEFAULT_WINDOW,
    cache_share: float | None = None,
    lookahead: bool | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model directory for mlx_lm's ``generate``, ``stream_generate``, ``make_prompt_cache``.

    Args:
        path: model directory made by ``mlx_flash convert``.
        ram: bytes or text such as "1.5GB" that the whole process may take, the KV cache for
            ``context`` tokens included. None takes up to three quarters of the machine's memory.
        use_flash: False loads mlx-lm's dense model, every weight in memory.
        context: tokens, prompt and generated, all sequences of a batch together, that the budget
            is planned for; with a budget the model refuses to go beyond. Default 2048, or what
            the model was made for if less.
        kept_share: for experiments, the share of layers whose rows are kept, instead of what the
            budget would buy; no predictors.
        predictor: how the rows that fire are known: "gate" or "up" (exact, for activations with
            zeros; that part stays in memory), "low-rank" or "threshold" (lossy, made by
            ``mlx_flash calibrate``), "none" (every row is read), or "auto": what was calibrated,
            else what is exact and fits. Where the budget holds every row nothing is predicted. Of
            mixtures nothing is predicted either; with "none" their layers get equal shares of the
            budget, whatever ``calibrate`` measured.
        policy: which rows leave the cache: window, lru or lfu.
        window: tokens that the policy "window" keeps rows for.
        cache_share: for experiments, the share of every layer's rows that the cache holds, instead
            of what the budget would buy.
        lookahead: whether to read ahead what the next layer's low-rank predictor names, or, of
            mixtures, what its router would choose; None takes the default: yes for predictors, no
            for mixtures.

    With a budget MLX's own buffer cache is limited, too, for the whole process. The model may be
    used by several threads in turn, not inside ``mx.grad`` or ``mx.compile``.

    Returns:
        (model, tokenizer). ``model.flash`` has the plan and the counters (not for a dense model).

    Raises:
        FlashError: see its subclasses; each message says what to do.
    """
    directory = ModelDirectory(path)
    tokenizer = load_tokenizer(directory)
    model = load_model(
        directory,
        ram,
        use_flash,
        context=context,
        kept_share=kept_share,
        predictor=predictor,
        policy=policy,
        window=window,
        cache_share=cache_share,
        lookahead=lookahead,
    )
    return model, tokenizer


def load_tokenizer(directory: ModelDirectory) -> Any:
    """mlx-lm's tokenizer of a model directory."""
    with foreign_errors(directory, "its tokenizer files or config.json"):
        config = utils.load_config(directory.path)
        # Where it does not know the model, transformers takes this, too, but warns of it.
        own = config.get("model_type") in INVENTED
        extra = {"config": PreTrainedConfig()} if own else None
        eos = config.get("eos_token_id")
        return utils.load_tokenizer(directory.path, extra, eos_token_ids=eos)


def load_model(
    directory: ModelDirectory,
    ram: int | str | None = None,
    use_flash: bool = True,
    *,
    context: int | None = None,
    kept_share: float | None = None,
    predictor: str = "auto",
    policy: str = DEFAULT_POLICY,
    window: int = DEFAULT_WINDOW,
    cache_share: float | None = None,
    lookahead: bool | None = None,
) -> nn.Module:
    """Like ``load``, without the tokenizer."""
    if context is not None and context < 1:
        raise BudgetError(f"a context is at least one token, got {context}")
    pagers.check_back_end(directory)
    make_policy(policy, 1, window)
    if directory.mixture and kept_share is not None:
        raise BudgetError("kept_share is for models without experts; give cache_share")
    predicts = use_flash and kept_share is None
    selection = select(directory, predictor) if predicts else None
    kind = selection.kind if selection else "none"
    if lookahead and kind != "low-rank" and not directory.mixture:
        raise PredictorError(
            f"lookahead is for low-rank predictors and for mixtures; {directory.path} is run with "
            f"predictor {kind}; leave it out"
        )
    reader = RowReader(directory.rows)
    try:
        needs = needs_of(directory, reader, context)
        budget = footprint.machine() * 3 // 4 if ram is None else parse_ram(ram)
        if use_flash and kept_share is None and (selection or directory.mixture):
            explicit = predictor != "auto" or selection is None
            curves = expert_file.curves_of(directory) if predictor != "none" else None
            plan = choose_sparse(budget, needs, directory, selection, explicit, cache_share, curves)
        else:
            plan = _choose(budget, needs, use_flash, kept_share, limited=ram is not None)
        policies = functools.partial(make_policy, policy, window=window)
        if lookahead is None:
            lookahead = LOOKAHEAD[directory.unit]
        flash = Flash(directory, plan, reader, selection, policies, lookahead)
        if ram is not None:
            mx.set_cache_limit(MLX_CACHE)
            flash.max_tokens = needs.context
        classes = functools.partial(_classes, flash=flash, paged=use_flash)
        with foreign_errors(directory):
            model, _ = utils.load_model(directory.path, lazy=True, get_model_classes=classes)
            flash.start(model)
        if use_flash:
            model.flash = flash
    except BaseException:
        reader.close()
        raise
    if not use_flash:
        reader.close()
    return model


def _choose(
    budget: int, needs: Needs, use_flash: bool, kept_share: float | None, limited: bool
) -> Plan:
    count = len(needs.layers)
    check_machine(budget, footprint.machine())
    if kept_share is not None or not use_flash:
        share = 1.0 if not use_flash else kept_share
        if not 0 <= share <= 1:
            raise BudgetError(f"kept_share is a share from 0 to 1, got {share}")
        streamed = count - round(share * count)
        kept, chosen = split(count, streamed)
        if limited and not use_flash and needs.dense > budget:
            raise BudgetError(
                f"the dense model needs {show(needs.dense)}, the RAM budget is {show(budget)}; "
                "run it without --dense, or with a larger budget"
            )
        lookup = bool(chosen)
        table = needs.table(needs.max_step, kept, lookup)
        return Plan(budget, kept, chosen, needs.max_step, table, lookup=lookup)
    return make_plan(budget, needs, footprint.machine())


def choose_sparse(
    budget: int,
    needs: Needs,
    directory: ModelDirectory,
    selection: Selection | None,
    explicit: bool,
    cache_share: float | None = None,
    curves: tuple[tuple[float, ...], ...] | None = None,
) -> Plan:
    """The plan for a model whose rows are predicted, or are experts.

    Args:
        explicit: the predictor was asked for by name; else layers are streamed whole where it does
            not fit.
        curves: of a mixture's layers, see ``expert_file``.
    """
    sparse = sparse_needs(directory, selection, curves)
    if cache_share is not None:
        if not 0 < cache_share <= 1:
            raise BudgetError(f"cache_share is a share above 0, at most 1, got {cache_share}")
        capacities = [max(1, round(cache_share * rows)) for rows in sparse.rows]
        return sparse_plan_of(None, needs, sparse, capacities, needs.max_step)
    try:
        return make_sparse_plan(budget, needs, sparse, footprint.machine())
    except BudgetError:
        if explicit:
            raise
        return make_plan(budget, needs, footprint.machine())


def _classes(config: dict[str, Any], flash: Flash, paged: bool) -> tuple[type, type]:
    """mlx-lm's classes for a config, the model's with paged FFNs."""
    base, args_class = get_classes(config)
    names = list(inspect.signature(base.__call__).parameters)[2:]

    class FlashModel(base):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            flash.pager.find(self)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return flash.weights(weights, getattr(super(), "sanitize", lambda given: given))

        @functools.wraps(base.__call__)
        def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
            kwargs |= dict(zip(names, args, strict=False))
            if not paged:
                return super().__call__(inputs, **kwargs)
            cache = kwargs.pop("cache", None)
            return flash.call(super().__call__, inputs, cache, kwargs)

    FlashModel.__name__ = FlashModel.__qualname__ = base.__name__
    FlashModel.__module__ = base.__module__
    return FlashModel, args_class

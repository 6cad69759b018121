"""Load a model directory for mlx-lm's own generation: a model and its tokenizer.

The model is an instance of the family's class whose FFNs are replaced where the plan says so.
Layers whose rows are all kept are mlx-lm's own modules with weights read from the row file.
Nothing in mlx_lm is patched.

Knows: mlx-lm's loading contract. Does not know: what things cost in memory
(``memory_requirements``), the command line.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils
from mlx_lm.models.cache import KVCache

from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import PredictorError
from mlx_flash.model_directory import tokenizer
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.registry import get_classes
from mlx_flash.models.rope_override import fit_context
from mlx_flash.paging.policies import DEFAULT_POLICY
from mlx_flash.predictors.selection import Selection, select
from mlx_flash.storage.reader import RowReader

from .foreign_errors import foreign_errors
from .kernels import check_temporary, compile_first
from .kv_policy import DEFAULT_KV, KVPolicy
from .literal_path import LiteralPath
from .memory_plan import plan_for
from .memory_requirements import memory_requirements
from .options import PagingOptions, policy_spec
from .paged_model import PagedModel
from .pagers import back_end


def load(
    path: str | Path,
    ram: int | str | None = None,
    use_flash: bool = True,
    *,
    context: int | None = None,
    kept_share: float | None = None,
    predictor: str = "auto",
    policy: str = DEFAULT_POLICY,
    window: int | None = None,
    cache_share: float | None = None,
    lookahead: bool | None = None,
    kv: str = DEFAULT_KV,
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
        policy: which rows leave the cache: "lfu", "lru" or "window".
        window: tokens that the policy "window" keeps rows for; None for 4.
        cache_share: for experiments, the share of every layer's rows that the cache holds, instead
            of what the budget would buy.
        lookahead: whether to read ahead what the next layer's low-rank predictor names, or, of
            mixtures, what its router would choose; None takes the default: yes for predictors, no
            for mixtures.
        kv: how keys and values of past tokens are kept: "plain", as mlx-lm does; "rotating:4096",
            the last so many tokens; "quantized:8", in so many bits.

    With a budget MLX's own buffer cache is limited, too, for the whole process, until
    ``model.flash.close()`` or the model's end. The model may be used by several threads in turn,
    not inside ``mx.grad`` or ``mx.compile``.

    Returns:
        (model, tokenizer). ``model.flash`` has the plan and the counters (not for a dense model).

    Raises:
        FlashError: see its subclasses; each message says what to do.
    """
    options = PagingOptions(
        ram=None if ram is None else parse_ram(ram),
        context=context,
        use_flash=use_flash,
        predictor=predictor,
        policy=policy_spec(policy, window),
        lookahead=lookahead,
        kept_share=kept_share,
        cache_share=cache_share,
        kv=kv,
    )
    directory = ModelDirectory(path)
    found = load_tokenizer(directory)
    return load_model(directory, options), found


def load_tokenizer(directory: ModelDirectory) -> Any:
    """mlx-lm's tokenizer of a model directory."""
    return tokenizer.load_tokenizer(directory.path, directory.config)


def load_model(directory: ModelDirectory, options: PagingOptions | None = None) -> nn.Module:
    """Like ``load``, without the tokenizer; None for the options' defaults."""
    options = options or PagingOptions()
    back_end.check_back_end(directory)
    if mx.default_device().type == mx.DeviceType.cpu:
        check_temporary()
        if options.ram is not None:
            compile_first(directory.config["flash"]["activation"], directory.dtype)
    selection = choose_predictors(directory, options)
    reader = RowReader(directory.rows)
    flash: PagedModel | None = None
    try:
        needs = memory_requirements(directory, reader, options, selection)
        plan = plan_for(needs, options, current_platform().machine_bytes())
        flash = PagedModel(directory, plan, reader, options, selection)
        if options.ram is not None:
            flash.limit(options.ram, needs.context)
        classes = functools.partial(_classes, flash=flash)
        with foreign_errors(directory):
            model, _ = utils.load_model(
                LiteralPath(directory.path), lazy=True, get_model_classes=classes
            )
            flash.start(model)
        if options.context:
            fit_context(model, options.context)
    except BaseException:
        (flash or reader).close()
        raise
    if options.use_flash:
        model.flash = flash
    else:
        reader.close()
    return model


def choose_predictors(directory: ModelDirectory, options: PagingOptions) -> Selection | None:
    """The predictors that the options stand for with this model; None where nothing is predicted.

    Raises:
        PredictorError: the model cannot be run that way; says how it can.
    """
    predicts = options.use_flash and options.kept_share is None
    selection = select(directory, options.predictor) if predicts else None
    prefetches = directory.mixture or (selection and selection.allows_prefetch)
    if options.lookahead and not prefetches:
        kind = selection.kind if selection else "none"
        raise PredictorError(
            f"lookahead is for low-rank predictors and for mixtures; {directory.path} is run with "
            f"predictor {kind}; leave it out"
        )
    return selection


def _classes(config: dict[str, Any], flash: PagedModel) -> tuple[type, type]:
    """mlx-lm's classes for a config, the model's with paged FFNs."""
    base, args_class = get_classes(config)
    names = list(inspect.signature(base.__call__).parameters)[2:]
    free = not flash.options.use_flash and flash.options.ram is None

    class FlashModel(base):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            flash.pager.find(self)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return flash.weights(weights, getattr(super(), "sanitize", lambda given: given))

        @functools.wraps(base.__call__)
        def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
            kwargs |= dict(zip(names, args, strict=False))
            if free:
                return super().__call__(inputs, **kwargs)
            cache = kwargs.pop("cache", None)
            return flash.call(super().__call__, inputs, cache, kwargs)

    if flash.options.kv != DEFAULT_KV:
        _cache_by(FlashModel, base, flash.kv)
    FlashModel.__name__ = FlashModel.__qualname__ = base.__name__
    FlashModel.__module__ = base.__module__
    return FlashModel, args_class


def _cache_by(model_class: type, base: type, kv: KVPolicy) -> None:
    """Let mlx-lm's ``make_prompt_cache`` of such models make a policy's caches."""

    def plain(model: nn.Module) -> list[Any]:
        return [KVCache() for _ in model.layers]

    def make_cache(model: nn.Module) -> list[Any]:
        return kv.make_cache(model)

    model_class.own_cache = getattr(base, "make_cache", plain)
    model_class.make_cache = make_cache

"""A model directory to what mlx-lm's own generation takes: (model, tokenizer).

The model is the family's class (``architectures``) with the FFN of some layers replaced. Layers
whose rows are kept are its own modules with weights read from the row file; the others stream.
Nothing in mlx_lm is patched.

Knows: mlx-lm's loading contract, what things cost in memory. Does not know: the command line.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models.cache import make_prompt_cache

from . import families, footprint
from .architectures import get_classes
from .budget import BUFFERS, Needs, Plan, make_plan, parse_ram, show, split
from .cache import DTYPES
from .directory import ModelDirectory
from .errors import BudgetError, FlashError, ModelError
from .ffn import CHUNK_BYTES, FlashMLP, dense_weights, placeholders, use_rows
from .reader import RowReader
from .stream import LayerStream

DEFAULT_CONTEXT = 2048
KV_STEP = 256  # mlx-lm's KV caches grow by so many tokens
MLX_CACHE = 8 << 20  # bytes that MLX may hold on to for reuse
SLACK = 20 << 20
SLACK_SHARE = 0.02  # of the weights: allocators round up


@dataclasses.dataclass
class FlashStats:
    """Counters since loading; subtract two of them for a span.

    ``hits`` and ``misses`` count rows found in memory and rows that had to be read;
    ``wait_seconds`` is the time that computing stood still for reading; ``forwards`` counts calls
    of the model, prompt chunks included.
    """

    bytes_read: int = 0
    requests: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    forwards: int = 0
    direct: bool = False

    def __sub__(self, earlier: FlashStats) -> FlashStats:
        old = dataclasses.asdict(earlier)
        new = {k: v - old[k] for k, v in dataclasses.asdict(self).items() if k != "direct"}
        return FlashStats(**new, direct=self.direct)


class Flash:
    """What pages a model's FFN: the attribute ``flash`` of a loaded model."""

    def __init__(self, directory: ModelDirectory, plan: Plan, reader: RowReader) -> None:
        self.directory = directory
        self.plan = plan
        self.reader = reader
        self.stream: LayerStream | None = None
        self.max_tokens: int | None = None
        self._forwards = 0
        self._found: list[tuple[str, nn.Module]] = []

    def stats(self) -> FlashStats:
        """The counters as they stand."""
        read = self.reader.stats()
        kept = sum(self.directory.rows.layers[i].rows for i in self.plan.kept)
        return FlashStats(
            bytes_read=read.bytes_read,
            requests=read.requests,
            read_seconds=read.read_seconds,
            wait_seconds=self.stream.wait_seconds if self.stream else 0.0,
            hits=kept * self._forwards,
            misses=self.stream.rows_acquired if self.stream else 0,
            forwards=self._forwards,
            direct=read.direct,
        )

    def close(self) -> None:
        """Stop reading and let go of the row file; the model cannot be used after that."""
        if self.stream:
            self.stream.close()
        self.reader.close()

    def install(self, model: nn.Module) -> None:
        """Drop the FFN weights of the layers that stream."""
        found = families.modules(model, self.directory.ffn)
        if len(found) != len(self.directory.rows.layers):
            raise ModelError(
                f"{self.directory.path}: the config makes {len(found)} layers, the row file has "
                f"{len(self.directory.rows.layers)}"
            )
        self._found = found
        for i in self.plan.streamed:
            use_rows(found[i][1], self.directory.ffn)

    def weights(
        self,
        resident: dict[str, mx.array],
        sanitize: Callable[[dict[str, mx.array]], Any],
    ) -> dict[str, mx.array]:
        """The resident weights and those of the layers that are kept, read now.

        The directory's weights are sanitised already, but mlx-lm's ``sanitize`` may also set the
        model up by what is among them (gemma3 ties its head), so it is shown every name, the
        streamed ones as placeholders that nothing evaluates; what it returns is not used.
        """
        weights = dict(resident)
        streamed = set()
        for i, (path, _) in enumerate(self._found):
            if i in self.plan.kept:
                found = dense_weights(self.reader, i, self.directory.ffn)
            else:
                found = placeholders(self.directory.rows, i, self.directory.ffn)
                streamed |= {f"{path}.{name}.weight" for name in found}
            weights |= {f"{path}.{name}.weight": weight for name, weight in found.items()}
        sanitize(dict(weights))
        return {name: weight for name, weight in weights.items() if name not in streamed}

    def start(self, model: nn.Module) -> None:
        """Put the streaming FFNs in place."""
        if not self.plan.streamed:
            return
        self.stream = LayerStream(self.reader, self.plan.streamed, BUFFERS)
        for i in self.plan.streamed:
            path, mlp = self._found[i]
            parent = model
            *above, name = path.split(".")
            for step in above:
                parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
            setattr(parent, name, FlashMLP(mlp, self.directory.ffn, i, self.stream))

    def call(self, forward: Callable[..., Any], inputs: mx.array, cache: Any, extra: Any) -> Any:
        """Run the model on chunks of the prompt that the plan has memory for."""
        step, length = self.plan.step, inputs.shape[1]
        self._check_context(cache, length)
        if extra or not cache or length <= step:
            self._forwards += 1
            return forward(inputs, cache=cache, **extra)
        outputs = []
        for start in range(0, length, step):
            self._forwards += 1
            outputs.append(forward(inputs[:, start : start + step], cache=cache))
            mx.eval([c.state for c in cache])
        return mx.concatenate(outputs, axis=1)

    def _check_context(self, cache: Any, length: int) -> None:
        offsets = [getattr(c, "offset", None) for c in cache or ()]
        offset = next((o for o in offsets if isinstance(o, int)), 0)
        if self.max_tokens is not None and offset + length > self.max_tokens:
            raise BudgetError(
                f"{offset + length} tokens are more than the context of {self.max_tokens} that "
                f"the budget of {show(self.plan.ram or 0)} was planned for; "
                "load with a larger context"
            )


def load(
    path: str | Path,
    ram: int | str | None = None,
    use_flash: bool = True,
    *,
    context: int | None = None,
    kept_share: float | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model directory for mlx_lm's ``generate``, ``stream_generate``, ``make_prompt_cache``.

    Args:
        path: model directory made by ``mlx_flash convert``.
        ram: bytes or text such as "1.5GB" that the whole process may take, the KV cache for
            ``context`` tokens included. None takes up to three quarters of the machine's memory.
        use_flash: False loads mlx-lm's dense model, every weight in memory.
        context: tokens, prompt and generated, that the budget is planned for; with a budget the
            model refuses to go beyond. Default 2048, or what the model was made for if less.
        kept_share: for experiments, the share of layers whose rows are kept, instead of what the
            budget would buy.

    Returns:
        (model, tokenizer). ``model.flash`` has the plan and the counters (not for a dense model).

    Raises:
        FlashError: see its subclasses; each message says what to do.
    """
    directory = ModelDirectory(path)
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, ram, use_flash, context=context, kept_share=kept_share)
    return model, tokenizer


def load_tokenizer(directory: ModelDirectory) -> Any:
    """mlx-lm's tokenizer of a model directory."""
    eos = utils.load_config(directory.path).get("eos_token_id")
    return utils.load_tokenizer(directory.path, eos_token_ids=eos)


def load_model(
    directory: ModelDirectory,
    ram: int | str | None = None,
    use_flash: bool = True,
    *,
    context: int | None = None,
    kept_share: float | None = None,
) -> nn.Module:
    """Like ``load``, without the tokenizer."""
    if context is not None and context < 1:
        raise BudgetError(f"a context is at least one token, got {context}")
    reader = RowReader(directory.rows)
    needs = needs_of(directory, reader, context)
    budget = footprint.machine() * 3 // 4 if ram is None else parse_ram(ram)
    plan = _choose(budget, needs, use_flash, kept_share, limited=ram is not None)
    if ram is not None:
        mx.set_cache_limit(MLX_CACHE)
    flash = Flash(directory, plan, reader)
    if ram is not None and use_flash:
        flash.max_tokens = _kv_tokens(needs.context)
    classes = functools.partial(_classes, flash=flash, paged=use_flash)
    try:
        model, _ = utils.load_model(directory.path, get_model_classes=classes)
    except FlashError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{directory.path} cannot be loaded: {error}") from error
    if use_flash:
        flash.start(model)
        model.flash = flash
    else:
        flash.close()
    return model


def needs_of(directory: ModelDirectory, reader: RowReader, context: int | None = None) -> Needs:
    """What the model in a directory needs, by size; nothing is loaded."""
    if context is None:
        context = min(DEFAULT_CONTEXT, directory.config.get("max_position_embeddings") or 2**31)
    layout, layers = directory.rows.layout, directory.rows.layers
    kv_cache = kv_bytes(directory, context)
    mx.clear_cache()
    footprint.trim()
    resident = sum(file.stat().st_size for file in directory.shards)
    weights = tuple(layer.rows * layout.ideal_bytes for layer in layers)
    widest = max(layer.rows for layer in layers)
    return Needs(
        process=footprint.current(),
        resident=resident,
        kv_cache=kv_cache,
        context=context,
        reader=reader.overhead_bytes + CHUNK_BYTES,
        slack=SLACK + int(SLACK_SHARE * (resident + sum(weights))),
        layers=weights,
        buffer=widest * sum(layout.extents),
        buffers=min(BUFFERS, len(layers)),
        workspace=functools.partial(_workspace, directory.config, widest, layout, context),
    )


def kv_bytes(directory: ModelDirectory, context: int) -> int:
    """Bytes of the KV cache for ``context`` tokens.

    A forward pass of one token is built but never evaluated; the shapes of its caches tell.
    """
    model_class, args_class = get_classes(directory.config)
    model = model_class(args_class.from_dict(directory.config))
    model.set_dtype(DTYPES[directory.rows.layout.parts[0].dtype])
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    total = largest = 0
    for entry in cache:
        arrays = [a for _, a in tree_flatten(entry.state) if isinstance(a, mx.array)]
        keys = getattr(entry, "keys", None)
        if isinstance(keys, mx.array) and keys.ndim == 4:
            tokens = min(_kv_tokens(context), getattr(entry, "max_size", None) or 2**31)
            size = tokens * sum(a.nbytes // a.shape[2] for a in (keys, entry.values))
        else:
            size = sum(a.nbytes for a in arrays)
        total, largest = total + size, max(largest, size)
    return total + largest  # a layer's cache is copied as it grows


def _kv_tokens(context: int) -> int:
    return (context // KV_STEP + 1) * KV_STEP


def _workspace(config: dict[str, Any], rows: int, layout: Any, context: int, step: int) -> int:
    """Bytes that computing ``step`` tokens takes besides what is kept, from above."""
    text = config.get("text_config") or config
    item = DTYPES[layout.parts[0].dtype].size
    heads = text.get("num_attention_heads") or text.get("n_head") or layout.parts[0].width // 64
    vocab = text.get("vocab_size", 0)
    attention = 4 * heads * step * (context + step) * item
    hidden = step * (4 * rows + 12 * layout.parts[0].width) * item
    head = vocab * (item + 5 * 4)
    return attention + hidden + head + MLX_CACHE


def _choose(
    budget: int, needs: Needs, use_flash: bool, kept_share: float | None, limited: bool
) -> Plan:
    count = len(needs.layers)
    if kept_share is not None or not use_flash:
        share = 1.0 if not use_flash else kept_share
        if not 0 <= share <= 1:
            raise BudgetError(f"kept_share is a share from 0 to 1, got {share}")
        streamed = count - round(share * count)
        kept, chosen = split(count, streamed) if streamed else (tuple(range(count)), ())
        if limited and not use_flash and needs.dense > budget:
            raise BudgetError(
                f"the dense model needs {show(needs.dense)}, the RAM budget is {show(budget)}; "
                "run it without --dense, or with a larger budget"
            )
        return Plan(budget, kept, chosen, needs.max_step, needs.table(needs.max_step, kept))
    return make_plan(budget, needs, footprint.machine())


def _classes(config: dict[str, Any], flash: Flash, paged: bool) -> tuple[type, type]:
    """The classes for a config, the model's with paged FFNs."""
    base, args_class = get_classes(config)

    class FlashModel(base):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            flash.install(self)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return flash.weights(weights, getattr(super(), "sanitize", lambda given: given))

        @functools.wraps(base.__call__)
        def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
            if args or not paged:
                return super().__call__(inputs, *args, **kwargs)
            cache = kwargs.pop("cache", None)
            return flash.call(super().__call__, inputs, cache, kwargs)

    FlashModel.__name__ = FlashModel.__qualname__ = base.__name__
    FlashModel.__module__ = base.__module__
    return FlashModel, args_class

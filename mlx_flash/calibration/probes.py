"""Looking into a model's FFNs while it runs, and perplexity with rows left out.

``watch`` puts itself around two projections of every FFN: the one whose output decides which rows
are active (the gate, or up where there is none), and down, whose input is what the rows give. That
way nothing is computed twice and every family works alike, kept or streamed. ``tap`` puts somebody
in front of any modules.

The comparison of perplexities is that of LLM in a flash, section 4, in small: what predictors cost
in quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.errors import CalibrationError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.families import Ffn, projections

LOGITS_BYTES = 48 << 20  # memory for the logits of a chunk of tokens
BYTES_PER_LOGIT = 12  # in the model's type, in float32, and their exponentials


@dataclass
class Seen:
    """What one layer's FFN computed for some tokens.

    Args:
        layer: its number.
        x: what the projections take, [..., d_model].
        gate: output of the gate before the activation, or of up where there is no gate.
        up: output of up before the product; None where there is no gate.
        h: what down takes, [..., rows].
    """

    layer: int
    x: mx.array
    gate: mx.array
    up: mx.array | None
    h: mx.array


Watcher = Callable[[Seen], mx.array]


class Tap(nn.Module):
    """A module with somebody who sees what goes in and what comes out.

    Args:
        inner: the module.
        before: given a call's positional arguments; what it returns takes the place of the first.
        after: given the first argument and the result.
    """

    def __init__(
        self,
        inner: nn.Module,
        before: Callable[..., mx.array] | None = None,
        after: Callable[[mx.array, mx.array], None] | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self._before, self._after = before, after

    def bind(self, rows: mx.array) -> None:
        """Hand rows on to a ``RowLinear``."""
        self.inner.bind(rows)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        x = x if self._before is None else self._before(x, *args)
        y = self.inner(x, *args, **kwargs)
        if self._after is not None:
            self._after(x, y)
        return y


def tap(model: nn.Module, watchers: Mapping[str, Callable[..., mx.array]]) -> None:
    """Put a ``Tap`` around modules of a model, for good.

    Args:
        watchers: path of a module -> ``Tap.before``.
    """
    modules = dict(model.named_modules())
    taps = [(path, Tap(modules[path], before)) for path, before in watchers.items()]
    model.update_modules(tree_unflatten(taps))


def watch(model: nn.Module, ffn: Ffn, watcher: Watcher) -> None:
    """Call ``watcher`` in every FFN of a loaded model.

    The watcher's return value replaces the FFN's hidden activations ``h``.
    """
    for layer, (_, mlp) in enumerate(model.flash.pager.found):
        _watch_layer(mlp, ffn, layer, watcher)


def _watch_layer(mlp: nn.Module, ffn: Ffn, layer: int, watcher: Watcher) -> None:
    seen: dict[str, mx.array] = {}
    names = projections(ffn)

    def after(part: str) -> Callable[[mx.array, mx.array], None]:
        def keep(x: mx.array, y: mx.array) -> None:
            seen["x"], seen[part] = x, y

        return keep

    def before(h: mx.array) -> mx.array:
        gate, up = seen.get("gate"), seen.get("up")
        if ffn.fused:
            gate, up = mx.split(seen["gate"], 2, axis=-1)
        elif gate is None:
            gate, up = up, None
        found = Seen(layer, seen["x"], gate, up, h)
        seen.clear()
        return watcher(found)

    for name in dict.fromkeys(name for part, name in names.items() if part != "down"):
        part = next(part for part, other in names.items() if other == name)
        mlp[name] = Tap(mlp[name], after=after(part))
    mlp[names["down"]] = Tap(mlp[names["down"]], before=before)


def chunk_size(directory: ModelDirectory, step: int) -> int:
    """Number of tokens whose logits are computed at once, at most ``step``."""
    return max(1, min(step, LOGITS_BYTES // (vocabulary(directory) * BYTES_PER_LOGIT)))


def logits_bytes(directory: ModelDirectory) -> int:
    """Memory that the logits of a chunk take."""
    return max(LOGITS_BYTES, vocabulary(directory) * BYTES_PER_LOGIT)


def vocabulary(directory: ModelDirectory) -> int:
    """Size of a model's vocabulary."""
    text = directory.config.get("text_config") or directory.config
    return max(1, int(text.get("vocab_size") or 1))


def run(model: nn.Module, tokens: np.ndarray, chunk: int) -> None:
    """Run one sequence for the sake of watchers; no logits are computed."""
    cache = make_prompt_cache(model)
    for start in range(0, len(tokens), chunk):
        model(mx.array(tokens[None, start : start + chunk]), cache=cache)
        mx.eval([c.state for c in cache])


def loss(model: nn.Module, tokens: np.ndarray, chunk: int) -> float:
    """Sum of -log p of every token but the first of one sequence.

    Raises:
        CalibrationError: it is infinite or not a number.
    """
    cache = make_prompt_cache(model)
    total = 0.0
    for start in range(0, len(tokens), chunk):
        stop = min(start + chunk, len(tokens))
        logits = model(mx.array(tokens[None, start:stop]), cache=cache)
        targets = mx.array(tokens[None, start + 1 : stop + 1])
        logits = logits[:, : targets.shape[1]]
        if targets.size:
            total += nn.losses.cross_entropy(
                logits.astype(mx.float32), targets, reduction="sum"
            ).item()
        mx.eval([c.state for c in cache])
    if not math.isfinite(total):
        raise CalibrationError(
            f"the model's loss on the calibration text is {total}: its weights are damaged or "
            "its float type is too narrow; convert it again, with another --dtype"
        )
    return total


def perplexity(
    model: nn.Module,
    sequences: Sequence[np.ndarray],
    chunk: int,
    progress: Callable[[int], Any] | None = None,
) -> float:
    """exp of the mean loss of a token; ``progress`` is told tokens."""
    total = 0.0
    for tokens in sequences:
        total += loss(model, tokens, chunk)
        if progress:
            progress(len(tokens))
    return mean_perplexity(total, sequences)


def mean_perplexity(total: float, sequences: Sequence[np.ndarray]) -> float:
    """Perplexity from the sum of the losses of all sequences."""
    return math.exp(total / sum(len(tokens) - 1 for tokens in sequences))

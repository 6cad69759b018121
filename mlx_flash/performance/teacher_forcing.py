"""A model walked over given text with mlx-lm's own generation loop, token by token, timed.

The loop does all that it does for a user, sampling included, but each next token is the text's, not
the model's: every run sees the same words, and none falls into a circle that needs the same few
rows again and again, as greedy decoding of a small model does.

Knows: mlx-lm's loop, the counters of a paged model. Does not know: budgets, what figures are for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from mlx_flash.calibration import text as text_module
from mlx_flash.errors import UsageError
from mlx_flash.runtime.paged_model import FlashStats

CHARS_PER_TOKEN = 12  # more than tokenizers make of English


@dataclass
class Step:
    """One decoded token: seconds, and what was counted for it (None for a dense model)."""

    seconds: float
    stats: FlashStats | None


@dataclass
class ForcedRun:
    """What a run over text took.

    Args:
        prompt_tokens: read at once, before the first step.
        prompt_seconds: that it took.
        steps: one for each decoded token.
    """

    prompt_tokens: int
    prompt_seconds: float
    steps: list[Step]

    @property
    def seconds(self) -> float:
        """Of all decoded tokens."""
        return sum(step.seconds for step in self.steps)

    def spent(self) -> FlashStats:
        """What was counted for the decoded tokens together."""
        total = FlashStats()
        for step in self.steps:
            if step.stats is not None:
                total = total - (FlashStats() - step.stats)
        return total


def book(tokenizer: Any, count: int, start: float = 0.0) -> np.ndarray:
    """``count`` tokens of the novel that ships with the package, from a share of it on.

    Where the novel ends it begins again.
    """
    text, _ = text_module.read(None, 1 << 30)
    at = int(start * len(text))
    text = text[at:] + text[:at]
    ids: list[int] = []
    length = count * CHARS_PER_TOKEN
    while True:
        ids = tokenizer.encode(text[:length], add_special_tokens=False, verbose=False)
        if len(ids) >= count or length >= len(text):
            break
        length *= 2
    if not ids:
        raise UsageError("the model's tokenizer makes no tokens of English text")
    return np.resize(np.array(ids, np.int32), count)


def walk(
    model: nn.Module,
    prompt: np.ndarray,
    follow: np.ndarray,
    *,
    seconds: float = float("inf"),
    least: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> ForcedRun:
    """Read the prompt, then decode the tokens that follow in the text.

    Args:
        seconds: stop decoding after so long, but not before ``least`` tokens.
        progress: told 1 for each decoded token, and the tokens of the prompt.
    """
    flash = getattr(model, "flash", None)
    count = lambda: flash.stats() if flash else None  # noqa: E731
    steps: list[Step] = []
    began = time.perf_counter()
    loop = _loop(model, prompt, follow)
    try:
        next(loop)
        last, before = time.perf_counter(), count()
        first = last - began
        if progress:
            progress(len(prompt))
        for _ in loop:
            now, after = time.perf_counter(), count()
            stats = after - before if after is not None and before is not None else None
            steps.append(Step(now - last, stats))
            last, before = now, after
            if progress:
                progress(1)
            if len(steps) >= least and last - began - first > seconds:
                break
    finally:
        loop.close()
        mx.synchronize()
    usual = float(np.median([step.seconds for step in steps])) if steps else 0.0
    # The loop has begun the first step before it hands out the prompt's token.
    return ForcedRun(len(prompt), max(first - usual, 1e-9), steps)


def _loop(model: nn.Module, prompt: np.ndarray, follow: np.ndarray) -> Iterator[Any]:
    words = iter([*follow.tolist(), int(follow[-1]), int(follow[-1])])

    def sampler(logprobs: mx.array) -> mx.array:
        chosen = mx.argmax(logprobs, axis=-1)  # as greedy decoding: the next step waits for it
        return chosen * 0 + next(words)

    return generate_step(mx.array(prompt), model, max_tokens=len(follow) + 1, sampler=sampler)

"""``prompt``, ``routing``, ``policies``: which experts are chosen, and what keeps them in slots."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.support.machine import OUT
from mlx_flash.paging.expert_switch import FlashSwitch
from mlx_flash.paging.policies import LFU, LRU, Belady, Policy, SlidingWindow
from mlx_flash.paging.simulate import miss_counts

from .bench import Bench
from .model import EXPERTS, TOP_K

POLICIES: dict[str, Callable[[], Policy]] = {
    "window 4": lambda: SlidingWindow(EXPERTS, 4),
    "lru": lambda: LRU(EXPERTS),
    **{f"lfu {n}": lambda n=n: LFU(EXPERTS, n) for n in (8, 32, 128, 512)},
}
SHARES = (0.25, 0.5)  # of the experts that have slots, for the policies


def trace_path(bench: Bench) -> Path:
    """The file that the experts chosen for the prompt are kept in."""
    count = bench.options.prompt_tokens
    return OUT / f"{bench.directory.path.name}-trace-{count}.npz"


def recorded(bench: Bench) -> list[np.ndarray]:
    """Experts chosen, of each layer [tokens, 8], for the words of the prompt."""
    if not trace_path(bench).exists():
        prompt(bench)
    with np.load(trace_path(bench)) as file:
        return [file[f"arr_{i}"] for i in range(bench.options.layers)]


def routing(bench: Bench) -> dict:
    """How uneven the made-up choice of experts is, over the recorded trace."""
    trace = recorded(bench)
    busiest, repeated = [], []
    for layer in trace:
        counts = np.sort(np.bincount(layer.ravel(), minlength=EXPERTS))[::-1]
        busiest.append([counts[: EXPERTS // n].sum() / counts.sum() for n in (8, 4, 2)])
        same = [np.isin(b, a).mean() for a, b in itertools.pairwise(layer)]
        repeated.append(np.mean(same))
    eighth, quarter, half = np.mean(busiest, axis=0)
    return {
        "tokens": len(trace[0]),
        "uses by the busiest eighth, quarter, half": [eighth, quarter, half],
        "never used, a layer": np.mean([EXPERTS - np.unique(t).size for t in trace]),
        "of the last token's experts too": np.mean(repeated),
    }


def policies(bench: Bench) -> dict:
    """Hits of policies over those of Belady's optimum, on the recorded choices of experts."""
    trace = [[np.unique(experts) for experts in layer] for layer in recorded(bench)]
    warm = len(trace[0]) // 4
    ratios: dict = {"tokens, of them to warm up": [len(trace[0]), warm]}

    def hits(capacity: int, make: Callable[[list[np.ndarray]], Policy]) -> int:
        missed = [miss_counts(layer, EXPERTS, capacity, make(layer)) for layer in trace]
        return uses - int(sum(counts[warm:].sum() for counts in missed))

    uses = sum(experts.size for layer in trace for experts in layer[warm:])
    for share in SHARES:
        capacity = round(share * EXPERTS)
        best = hits(capacity, lambda layer: Belady(EXPERTS, layer))
        ratios[f"{share:.0%} of the experts"] = {
            "belady, hits / uses": best / uses,
            **{
                f"{label} / belady": hits(capacity, lambda _, m=make: m()) / best
                for label, make in POLICIES.items()
            },
        }
    return ratios


def prompt(bench: Bench) -> dict:
    """A prompt: its time, and bytes read over those of all experts needed in each of its chunks."""
    model, count = bench.model, bench.options.prompt_tokens
    chosen: list[list[np.ndarray]] = [[] for _ in model.layers]
    call = FlashSwitch.__call__

    def watched(self: FlashSwitch, x: mx.array, indices: mx.array, *args, **kwargs) -> mx.array:
        y = call(self, x, indices, *args, **kwargs)
        chosen[self.layer].append(np.array(indices).reshape(-1, TOP_K))
        return y

    FlashSwitch.__call__ = watched
    try:
        tokens = mx.array(bench.words[None, :count])
        before, began = model.flash.stats(), time.perf_counter()
        mx.eval(model(tokens, cache=make_prompt_cache(model))[:, -1])
        seconds = time.perf_counter() - began
        spent = model.flash.stats() - before
    finally:
        FlashSwitch.__call__ = call
    np.savez(trace_path(bench), *[np.concatenate(layer) for layer in chosen])
    needed = sum(np.unique(chunk).size for layer in chosen for chunk in layer)
    return {
        "tokens": count,
        "chunks": len(chosen[0]),
        "seconds": seconds,
        "waiting": spent.wait_seconds,
        "GB read": spent.bytes_read / 1e9,
        "experts needed, a layer and chunk": needed / len(chosen) / len(chosen[0]),
        "read / needed once per layer and chunk": spent.bytes_read / (needed * bench.stride),
    }

"""What reading only the rows that fire takes: overlap, growth, drift, our own share of the time.

Models are random, sparse by construction (``synthetic_llama``, ``synthetic_opt``), with low-rank
predictors that are nearly right. Tokens are given, not generated, so that all who are compared see
the same ones; figures are medians, and every ratio comes from runs in one process that take turns.

    overlap    a token's time over the longer of reading alone (the same reads again, without
               computing) and computing alone (every row in slots)
    lookahead  with what the next layer's predictor names read ahead, and without
    growth     four times as many neurons, as many of them firing, as many in slots
    drift      footprint over 2,000 tokens, once slots and MLX's buffers are full; the KV cache is a
               rotating one of 256
    profile    a decode step of OPT-6.7B's shape, 4 of its 32 layers, where its time goes
    resident   every row in memory, against the dense model

    python -m benchmarks.speed.sparse_speed                          # 13 GB of disk, 10 minutes
    python -m benchmarks.speed.sparse_speed --small --only overlap   # 0.1 GB

Knows: the package's loader, its counters. Does not know: how models are made.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from benchmarks.support import synthetic_opt
from benchmarks.support.machine import OUT, machine_name
from benchmarks.support.synthetic_llama import SMALL, Shape, make
from mlx_flash.common.platform import current_platform
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging import row_stream
from mlx_flash.performance.inspection import describe
from mlx_flash.predictors import predictor
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

WARM = 48  # tokens before any figure counts: slots fill
DRIFT_TOKENS, DRIFT_WARM, KV = 2000, 1200, 256
NARROW = Shape(1024, 4096, 8, 16, 4, 8000, 128, active=0.08, predicted=0.10)
WIDE = dataclasses.replace(NARROW, rows=4 * 4096, active=0.02, predicted=0.025)
OPT = synthetic_opt.Shape(layers=4)


class Run:
    """A model that is given tokens one by one."""

    def __init__(self, directory: ModelDirectory, tokens: list[int], **how: object) -> None:
        self.model = load_model(directory, PagingOptions(**how))
        self.tokens = tokens
        self.cache = make_prompt_cache(self.model)
        self.at = 0

    def step(self) -> float:
        """Seconds of one token."""
        token = self.tokens[self.at % len(self.tokens)]
        self.at += 1
        began = time.perf_counter()
        logits = self.model(mx.array([[token]]), cache=self.cache)
        mx.eval(mx.argmax(logits[:, -1], axis=-1))
        return time.perf_counter() - began

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def again(self) -> None:
        """From the first token on; slots keep what they hold."""
        self.cache, self.at = make_prompt_cache(self.model), 0

    def close(self) -> None:
        if hasattr(self.model, "flash"):
            self.model.flash.close()
        del self.model
        gc.collect()
        mx.clear_cache()


def llama(name: str, shape: Shape) -> tuple[ModelDirectory, list[int]]:
    """The synthetic llama, and the tokens of its text."""
    out = make(OUT / name, shape)
    directory = ModelDirectory(out / "relu-rows")
    config = directory.config
    return directory, [*config["flash_prompt"], *config["flash_text"]]


def in_turn(runs: dict[str, Run], count: int) -> dict[str, float]:
    """Median seconds a token of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            times[name].append(run.step())
    return {name: statistics.median(found) for name, found in times.items()}


class Recorder:
    """Notes what a reader is asked for, so that it can be read again without computing."""

    def __init__(self, reader: RowReader) -> None:
        self.reader, self.asked = reader, []
        self._submit = reader.submit
        reader.submit = self.submit  # of this one reader

    def submit(self, layer: int, read: object, behind: bool = False) -> list:
        self.asked.append((layer, read))
        return self._submit(layer, read, behind)

    def again(self, tokens: int) -> float:
        """Seconds a token, layer after layer."""
        began = time.perf_counter()
        for layer, read in self.asked:
            self.reader.wait(self._submit(layer, read))
        return (time.perf_counter() - began) / tokens


def overlap(options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """A token over the longer of reading alone and computing alone."""
    directory, tokens = llama(*_llama(options))
    paged = Run(directory, tokens, predictor="low-rank", cache_share=options.cache_share)
    held = Run(directory, tokens, predictor="low-rank", cache_share=0.9995)
    paged.steps(WARM)
    held.steps(WARM + options.tokens)  # once over all of them, then every row is there
    held.again()
    held.steps(WARM)
    recorder = Recorder(paged.model.flash.reader)
    before, full = paged.model.flash.stats(), held.model.flash.stats()
    found = in_turn({"paged": paged, "computing alone": held}, options.tokens)
    spent = paged.model.flash.stats() - before
    reading = statistics.median(recorder.again(options.tokens) for _ in range(5))
    yield "ms a token", 1e3 * found["paged"]
    yield "computing alone, ms", 1e3 * found["computing alone"]
    yield "MB that it read", (held.model.flash.stats() - full).bytes_read / options.tokens / 1e6
    yield "reading alone, ms", 1e3 * reading
    yield "MB read a token", spent.bytes_read / options.tokens / 1e6
    yield "requests a token", spent.requests / options.tokens
    yield "waiting, ms", 1e3 * spent.wait_seconds / options.tokens
    yield "rows in slots, share", options.cache_share
    yield "ratio", found["paged"] / max(found["computing alone"], reading)
    paged.close()
    held.close()


def lookahead(options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """With what the next layer's predictor names read ahead, and without."""
    directory, tokens = llama(*_llama(options))
    runs = {
        name: Run(
            directory, tokens, predictor="low-rank", cache_share=options.cache_share, lookahead=on
        )
        for name, on in (("with", True), ("without", False))
    }
    for run in runs.values():
        run.steps(WARM)
    before = {name: run.model.flash.stats() for name, run in runs.items()}
    found = in_turn(runs, options.tokens)
    for name, run in runs.items():
        spent = run.model.flash.stats() - before[name]
        yield f"{name}: ms a token", 1e3 * found[name]
        yield f"{name}: waiting, ms", 1e3 * spent.wait_seconds / options.tokens
        yield f"{name}: bookkeeping and copies, ms", 1e3 * spent.manage_seconds / options.tokens
        yield f"{name}: MB read a token", spent.bytes_read / options.tokens / 1e6
        if name == "with":
            yield "prefetched reads that were needed", spent.useful / max(1, spent.foretold)
            prefetchers = [layer.mlp.gather.prefetcher for layer in run.model.layers]
            gates = [one.gate for one in prefetchers if one]
            right = sum(g.right for g in gates) / max(1, sum(g.predicted for g in gates))
            yield "prefetched rows that were needed", right
        run.close()
    yield "ratio", found["with"] / found["without"]


def growth(options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """Four times as many neurons, as many of them firing, as many in slots."""
    slots = NARROW.rows // 5
    runs = {}
    for name, shape in (("narrow", NARROW), ("wide", WIDE)):
        directory, tokens = llama(f"llama-{name}", shape)
        runs[name] = Run(directory, tokens, predictor="low-rank", cache_share=slots / shape.rows)
        runs[name].steps(WARM)
    before = {name: run.model.flash.stats() for name, run in runs.items()}
    found = in_turn(runs, options.tokens)
    for name, run in runs.items():
        spent = run.model.flash.stats() - before[name]
        yield f"{name}: ms a token", 1e3 * found[name]
        yield f"{name}: predicting, ms", 1e3 * spent.predict_seconds / options.tokens
        yield f"{name}: waiting, ms", 1e3 * spent.wait_seconds / options.tokens
        yield f"{name}: rows predicted a layer", spent.predicted / spent.layer_calls
        yield f"{name}: MB read a token", spent.bytes_read / options.tokens / 1e6
        run.close()
    yield "ratio", found["wide"] / found["narrow"]


def drift(options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """The footprint over 2,000 tokens at a steady budget."""
    directory, tokens = llama("llama-small", SMALL)
    vocab = directory.config["vocab_size"]
    random = np.random.default_rng(0).integers(600, vocab, DRIFT_TOKENS).tolist()
    info = describe(directory, PagingOptions(context=KV + 64))
    ram = info["least_bytes"] + (info["dense_bytes"] - info["least_bytes"]) // 3
    run = Run(directory, [*tokens, *random], ram=ram, context=KV + 64, predictor="low-rank")
    if not run.model.flash.plan.slots:
        raise RuntimeError("nothing is paged")
    run.model.flash.max_tokens = None  # the cache is what stays within the context
    run.cache = [RotatingKVCache(max_size=KV) for _ in run.model.layers]
    run.steps(DRIFT_WARM)
    seen, active = [current_platform().process_bytes()], [mx.get_active_memory()]
    for _ in range(DRIFT_TOKENS // 100):
        run.steps(100)
        seen.append(current_platform().process_bytes())
        active.append(mx.get_active_memory())
    yield "RAM budget, MB", ram / 1e6
    yield "slots", sum(run.model.flash.plan.slots.values())
    yield "footprint before, MB", seen[0] / 1e6
    yield "least and most of 20 looks, MB", [min(seen) / 1e6, max(seen) / 1e6]
    yield "MLX active memory, least and most, MB", [min(active) / 1e6, max(active) / 1e6]
    yield "first and last look, MB", [seen[0] / 1e6, seen[-1] / 1e6]
    yield "most over first", max(seen) / seen[0] - 1
    yield (
        "drift: mean of the last 5 looks over that of the first 5",
        (statistics.mean(seen[-5:]) / statistics.mean(seen[:5]) - 1),
    )
    run.close()


def profile(options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """Where a decode step of OPT-6.7B's shape spends its time."""
    directory = synthetic_opt.make(OUT / "opt-4-layers", OPT)
    words = [int(word) for word in synthetic_opt.words(OPT.vocab)[20_000:21_000]]
    run = Run(directory, words, predictor="low-rank", cache_share=0.25)
    run.steps(12)
    clock = Clock(run.model.flash.reader)
    count = options.tokens // 2
    with clock.running():
        began = time.perf_counter()
        run.steps(count)
        seconds = time.perf_counter() - began
    yield "ms a token", 1e3 * seconds / count
    yield "MLX evaluating, share", clock.evaluating / seconds
    yield "waiting for reads, share", clock.waiting / seconds
    yield (
        "the rest: our Python, numpy's copies, building graphs",
        (1 - (clock.evaluating + clock.waiting) / seconds),
    )
    yield "of it numpy's copies, share of all", clock.copying / seconds
    run.close()


class Clock:
    """Time that the decoding thread spends in MLX's evaluation, in waiting for reads, in copies.

    cProfile cannot tell: MLX's functions are none to it, their time goes to whoever calls them.
    """

    def __init__(self, reader: RowReader) -> None:
        self.evaluating = self.waiting = self.copying = 0.0
        self._reader = reader

    def _timed(self, name: str, work: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                setattr(self, name, getattr(self, name) + time.perf_counter() - began)

        return call

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put the clock around what is timed, for as long as this lasts."""
        union = predictor.union

        def evaluated(mask: mx.array) -> np.ndarray:
            mx.eval(mask)
            return union(mask)

        with ExitStack() as stack:
            for target, name, work in (
                (mx, "eval", self._timed("evaluating", mx.eval)),
                (mx, "async_eval", self._timed("evaluating", mx.async_eval)),
                (self._reader, "wait", self._timed("waiting", self._reader.wait)),
                (self._reader, "read", self._timed("waiting", self._reader.read)),
                (row_stream, "_copy", self._timed("copying", row_stream._copy)),
                (row_stream, "_into_slots", self._timed("copying", row_stream._into_slots)),
                (predictor, "union", evaluated),
            ):
                stack.enter_context(mock.patch.object(target, name, work))
            yield


def resident(options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """Every row in memory, against the dense model."""
    out = make(OUT / "llama-small", SMALL)
    for variant in ("relu", "silu"):
        directory = ModelDirectory(out / f"{variant}-rows")
        tokens = [*directory.config["flash_prompt"], *directory.config["flash_text"]]
        runs = {
            "kept": Run(directory, tokens),
            "dense": Run(directory, tokens, use_flash=False),
        }
        if any(
            isinstance(m, nn.Module) and hasattr(m, "_stream") for m in runs["kept"].model.layers
        ):
            raise RuntimeError("something is paged")
        ratios = []
        for _ in range(9):
            found = in_turn(runs, 16)
            ratios.append(found["dense"] / found["kept"])
        yield f"{variant}: tokens/s over dense, 9 pairs", [min(ratios), max(ratios)]
        yield f"{variant}: ratio", statistics.median(ratios)
        for run in runs.values():
            run.close()


def _llama(options: argparse.Namespace) -> tuple[str, Shape]:
    return ("llama-small", SMALL) if options.small else ("llama-1.1b", Shape())


PARTS = {
    "overlap": overlap,
    "lookahead": lookahead,
    "growth": growth,
    "drift": drift,
    "profile": profile,
    "resident": resident,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="with commas between them")
    parser.add_argument("--small", action="store_true", help="overlap, lookahead: 0.1 GB")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cache-share", type=float, default=0.2, help="of the rows, in slots")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - PARTS.keys():
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    print(f"{machine_name()}, {date.today().isoformat()}")
    results: dict[str, dict] = {}
    for name in options.only.split(","):
        print(f"\n{name}")
        for label, value in PARTS[name](options):
            results.setdefault(name, {})[label] = value
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"  {label:<44} {shown}", flush=True)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()

"""What each step of LLM in a flash saves, on a random model of OPT-6.7B's shape (section 4, OPT).

The model (``synthetic_opt``, 13 GB) is loaded and decodes the words of a novel token by token;
which rows its predictors name is recorded. The reads of each step are then done again for those
very tokens, without computing, from the same files, direct. Steps and fio take turns; figures are
medians.

    naive       every weight, one sequential read of both files by 8 threads, 2 MiB a request
    hybrid      half of that
    predictor   all weights but the FFN resident; the predicted rows of each token, all of them
    window      those of them that no prediction for the last 4 tokens named
    bundling    the same rows, up and down of a neuron by one read of 16 KiB
    lfu         not the paper's: the package's default policy instead of the window

Up to and with "window" a row is two reads of 8 KiB far apart: the same bytes are taken as a file
whose layers hold all up rows and then all down rows. Real are the reads, the predictors' work, the
tables; made up are the weights, so which rows are wanted (see ``synthetic_opt``). Besides, the
whole model's own tokens/s, and the share of a token's time that the rows' path takes besides
reading and matmuls: predicting, tables, handing row numbers over.

    python -m benchmarks.speed.staircase                        # 13 GB, 27 GB of disk meanwhile
    python -m benchmarks.speed.staircase --small --repeats 1    # 0.2 GB, to try it

Knows: the steps, the package's reader, tables and statistics. Does not know: how the model is made.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.support import fio
from benchmarks.support.fio import BLOCK, STREAMS, read_through, warm
from benchmarks.support.machine import OUT, machine_name
from benchmarks.support.synthetic_opt import SMALL, Shape, make, words
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging.policies import make_policy
from mlx_flash.paging.simulate import misses
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.predictors.low_rank import LowRank
from mlx_flash.predictors.predictor import Prediction, union
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions, policy_spec
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_file import Layer, RowFile
from mlx_flash.storage.row_layout import RowLayout

START = 20_000  # words into the novel: past what the model was made with
WARM = 8  # tokens before any figure counts
SLOW = 6  # steps that read every predicted row replay one token in six, to save time
TRACE = "staircase-trace.npz"
Trace = list[list[np.ndarray]]  # of each layer, for each token the predicted rows


class Watched:
    """A predictor that keeps what it names and what its matmuls take."""

    def __init__(self, inner: LowRank) -> None:
        self.inner = inner
        self.kind, self.exact = inner.kind, inner.exact
        self.provides, self.nbytes = inner.provides, inner.nbytes
        self.rows: list[np.ndarray] = []
        self.matmul_seconds = 0.0

    def __call__(self, x: mx.array) -> Prediction:
        began = time.perf_counter()
        mask = self.inner.mask(x)
        mx.eval(mask)
        self.matmul_seconds += time.perf_counter() - began
        prediction = Prediction(union(mask))
        self.rows.append(prediction.rows.astype(np.int32))
        return prediction


def decode(directory: ModelDirectory, options: argparse.Namespace) -> tuple[Trace, dict]:
    """The whole model over the novel's words, one at a time; what it predicts and takes."""
    model = load_model(
        directory,
        PagingOptions(
            predictor="low-rank",
            policy=policy_spec(
                options.policy, options.window if options.policy == "window" else None
            ),
            cache_share=options.cache_share,
        ),
    )
    watched = []
    for layer in model.layers:
        layer.mlp.predictor = Watched(layer.mlp.predictor)
        watched.append(layer.mlp.predictor)
    cache = make_prompt_cache(model)
    tokens = words(directory.config["vocab_size"])[START : START + WARM + options.tokens]
    for count, token in enumerate(tokens):
        if count == WARM:
            before, began = model.flash.stats(), time.perf_counter()
            matmul = sum(predictor.matmul_seconds for predictor in watched)
        mx.eval(model(mx.array([[int(token)]]), cache=cache))
    seconds = time.perf_counter() - began
    spent = model.flash.stats() - before
    matmul = sum(predictor.matmul_seconds for predictor in watched) - matmul
    rows = directory.rows.layers[0].rows
    bookkeeping = spent.predict_seconds - matmul + spent.manage_seconds
    figures = {
        "tokens": options.tokens,
        "tokens/s": options.tokens / seconds,
        "ms/token": 1e3 * seconds / options.tokens,
        "of that waiting for reads": spent.wait_seconds / seconds,
        "predictors' matmuls": matmul / seconds,
        "rows' path besides reading and matmuls": bookkeeping / seconds,
        "the same with the predictors' matmuls": (bookkeeping + matmul) / seconds,
        "ms/token, that path": 1e3 * bookkeeping / options.tokens,
        "MB/token": spent.bytes_read / options.tokens / 1e6,
        "predicted share": spent.predicted / spent.layer_calls / rows,
        "fresh share": spent.misses / spent.layer_calls / rows,
        "load": [round(x, 1) for x in os.getloadavg()],
    }
    model.flash.close()
    return [predictor.rows for predictor in watched], figures


def missing(trace: Trace, rows: int, policy: str, capacity: int) -> Trace:
    """What has to be read when a policy keeps rows; what passes by is read each time."""
    return [misses(layer, rows, capacity, make_policy(policy, rows)) for layer in trace]


def unbundled(file: RowFile) -> RowFile:
    """The same bytes as a file of half rows: all up rows of a layer, then all down rows."""
    half = copy.copy(file)
    part = file.layout.parts[0]
    half.layout = RowLayout.plan(("half",), part.dtype, part.width, min(4096, part.nbytes))
    half.layers = [Layer(layer.offset, 2 * layer.rows) for layer in file.layers]
    if 2 * half.layout.stride != file.layout.stride:
        raise RuntimeError("rows of this width are padded: halves of them are no rows")
    return half


class Replay:
    """Reads the rows of recorded tokens, token by token; of every sixth token for ``every=6``."""

    def __init__(self, file: RowFile, trace: Trace, bundled: bool, every: int = 1) -> None:
        self.reader = RowReader(file if bundled else unbundled(file))
        count = file.layers[0].rows
        if not bundled:
            trace = [[np.append(r, r + count) for r in layer] for layer in trace]
        self.tokens = [[layer[t] for layer in trace] for t in range(WARM, len(trace[0]), every)]
        most = max(rows.size for token in self.tokens for rows in token)
        self.memory = SlotMemory(self.reader.file.layout, most)

    def __call__(self) -> tuple[float, float]:
        """(seconds, bytes) per token."""
        before, began = self.reader.stats(), time.perf_counter()
        for token in self.tokens:
            for layer, rows in enumerate(token):
                if rows.size:
                    slots = np.arange(rows.size)
                    self.reader.read(layer, rows, slots, self.memory.views)
        seconds = time.perf_counter() - began
        nbytes = (self.reader.stats() - before).bytes_read
        return seconds / len(self.tokens), nbytes / len(self.tokens)


def staircase(directory: ModelDirectory, trace: Trace, options: argparse.Namespace) -> dict:
    """Bytes and milliseconds a token of every step."""
    file = directory.rows
    rows = file.layers[0].rows
    capacity = round(options.cache_share * rows)
    weights = [file.path, *directory.shards]
    window = missing(trace, rows, f"window:{options.window}", capacity)
    steps: dict[str, Callable[[], tuple[float, float]]] = {
        "naive": lambda: read_through(weights),
        "hybrid": lambda: read_through(weights, 0.5),
        "+ predictor": Replay(file, trace, bundled=False, every=SLOW),
        "+ window": Replay(file, window, bundled=False),
        "+ bundling": Replay(file, window, bundled=True),
        "+ lfu": Replay(file, missing(trace, rows, "lfu", capacity), bundled=True),
        "bundling without window": Replay(file, trace, bundled=True, every=SLOW),
    }
    stride = file.layout.stride
    fios = {
        "fio, random, a row": (stride, 32, "randread"),
        "fio, random, half a row": (stride // 2, 32, "randread"),
        "fio, sequential": (BLOCK, STREAMS, "read"),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    speeds: dict[str, list[float]] = {name: [] for name in fios}
    passes = warm(weights)
    for _ in range(options.repeats):
        for name, step in steps.items():
            runs[name].append(step())
        for name, (block, threads, pattern) in fios.items():
            speeds[name].append(fio.bytes_per_second(file.path, block, threads, pattern))
    found: dict = {"passes to warm up": {"GB/s": [round(speed, 2) for speed in passes]}}
    for name, pairs in runs.items():
        seconds = statistics.median(s for s, _ in pairs)
        found[name] = {
            "MB/token": pairs[0][1] / 1e6,
            "MB/s": pairs[0][1] / seconds / 1e6,
            "ms/token": 1e3 * seconds,
            "from, to": [round(1e3 * f(s for s, _ in pairs), 1) for f in (min, max)],
        }
    for name, values in speeds.items():
        found[name] = {"MB/s": statistics.median(values) / 1e6}
    for name in ("+ bundling", "+ lfu"):
        ratios = [n[0] / e[0] for n, e in zip(runs["naive"], runs[name], strict=True)]
        found[f"naive over {name}"] = {"ratio": statistics.median(ratios)}
    found["load"] = {"1, 5, 15 min": [round(x, 1) for x in os.getloadavg()]}
    return found


def shares(trace: Trace, rows: int) -> dict:
    """Of the recorded rows, what a window leaves to read, as shares of the FFN."""
    found = {"predicted": np.mean([r.size for layer in trace for r in layer[WARM:]]) / rows}
    for window in (1, 2, 4, 5):
        fresh = missing(trace, rows, f"window:{window}", rows)
        mean = np.mean([r.size for layer in fresh for r in layer[WARM:]]) / rows
        found[f"fresh at window {window}"] = mean
    counts = np.zeros(rows)
    for layer in trace:
        counts += np.sort(np.bincount(np.concatenate(layer[WARM:]), minlength=rows))[::-1]
    found["uses by the busiest tenth of the rows"] = counts[: rows // 10].sum() / counts.sum()
    return {name: float(value) for name, value in found.items()}


def save(path: Path, trace: Trace) -> None:
    """Keep a trace for ``--reads-only``."""
    np.savez(path, *[np.concatenate(t) for t in trace], sizes=[[r.size for r in t] for t in trace])


def saved(path: Path) -> Trace:
    """The trace that ``save`` kept."""
    with np.load(path) as file:
        sizes = file["sizes"]
        return [np.split(file[f"arr_{i}"], np.cumsum(s)[:-1]) for i, s in enumerate(sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="made if it is not there")
    parser.add_argument("--small", action="store_true", help="a model of 0.2 GB")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--policy", default="window", help="of the decoding run")
    parser.add_argument("--cache-share", type=float, default=0.3, help="of a layer's rows")
    parser.add_argument("--reads-only", action="store_true", help="of the tokens recorded before")
    options = parser.parse_args()
    fio.require()
    path = options.model or OUT / ("opt-small-shape" if options.small else "opt-6.7b-shape")
    path.parent.mkdir(exist_ok=True)
    directory = make(path, SMALL if options.small else Shape())
    recorded = path.with_name(f"{path.name}-{TRACE}")
    results: dict = {"machine": machine_name(), "date": date.today().isoformat()}
    print(f"{results['machine']}, {results['date']}")
    warm([directory.rows.path, *directory.shards])
    if options.reads_only:
        trace = saved(recorded)
    else:
        trace, results["decoding"] = decode(directory, options)
        save(recorded, trace)
    results["trace"] = shares(trace, directory.rows.layers[0].rows)
    for part in ("decoding", "trace"):
        print(f"\n{part}")
        for label, value in results.get(part, {}).items():
            number = f"{value:.4g}" if isinstance(value, float) else value
            print(f"  {label:<44} {number}", flush=True)
    results["reads"] = staircase(directory, trace, options)
    print("\nreads")
    for name, figures in results["reads"].items():
        numbers = (
            f"{label} {n:.5g}" if isinstance(n, float) else f"{label} {n}"
            for label, n in figures.items()
        )
        print(f"  {name:<26}", ", ".join(numbers))
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()

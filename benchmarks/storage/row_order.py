"""What the order of rows on flash, and joining reads across gaps, save in reading.

Real traces: what each token of a novel asks for, by the predictors that the models run with. The
order is learned from half of the text, as ``mlx_flash reorder`` learns it, and the other half is
replayed through the package's own slots with the default policy; what the slots lack is read by the
package's reader, layer after layer, from two row files that differ in the order of rows only. Times
are medians of turns in which all variants of a share of slots follow each other.

Models: the two trained ReLU models of tests/fixtures; SmolLM2 with a threshold (half of the rows
left out), fitted by ``calibrate``; a random model of OPT's form (``synthetic_opt --small``). Rows
of the trained models are far shorter than those of a model that one would page, so they are
replayed at 16 KiB a row, too (``--row-bytes``), as in OPT-6.7B.

    python -m benchmarks.storage.row_order --cost                 # what a request and a byte take
    python -m benchmarks.storage.row_order --models llama-relu-austen --row-bytes 16384

Knows: traces, orders, the reader. Does not know: what computing takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date

import numpy as np

from benchmarks.support import synthetic_opt
from benchmarks.support.converted import converted
from benchmarks.support.fio import warm
from benchmarks.support.machine import OUT, ROOT, machine_name
from demos.smollm2 import smollm2_gguf
from mlx_flash.calibration import recordings
from mlx_flash.calibration import text as text_module
from mlx_flash.calibration.calibrate import calibrate
from mlx_flash.calibration.reorder import access_trace, ordering
from mlx_flash.calibration.reorder.reorder import wanted_bytes
from mlx_flash.calibration.text_run import TextRun
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging.policies import DEFAULT_POLICY, make_policy
from mlx_flash.paging.simulate import misses
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.selection import select
from mlx_flash.runtime.load import load_tokenizer
from mlx_flash.storage.read_requests import gap_bytes
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_file import RowFile
from mlx_flash.storage.row_layout import RowLayout
from mlx_flash.storage.row_writer import RowFileWriter

MODELS = ("opt-austen", "llama-relu-austen", "smollm2-threshold", "opt-small")
SHARES = (0.1, 0.2, 0.3)
WARM = 0.25  # of the measured half, before reads count
COST_ROWS = 256  # requests of a read in ``cost``


def directory_of(name: str) -> ModelDirectory:
    """The model, made if it is not there."""
    out = f"order-{name}"
    if name == "opt-small":
        return synthetic_opt.make(OUT / out, synthetic_opt.SMALL)
    if name != "smollm2-threshold":
        return converted(out, ROOT / "tests" / "fixtures" / name, dtype="float32")
    directory = converted(out, smollm2_gguf(), dtype="float32", dequantize=True)
    if not (directory.path / predictor_file.NAME).exists():
        calibrate(directory.path, kind="threshold", tokens=1024)
    return directory


def traces(name: str, tokens: int) -> tuple[ModelDirectory, list[tuple[np.ndarray, np.ndarray]]]:
    """Of each layer what the tokens of both halves ask for, bool [tokens, rows]."""
    directory = directory_of(name)
    selection = select(directory)
    path = OUT / f"order-trace-{name}-{tokens}"
    positions = directory.config.get("max_position_embeddings")
    text = text_module.load(None, load_tokenizer(directory), tokens, positions, 0)
    # Both halves are as long: what ``load`` picks for training is cut in two.
    cut = len(text.train) // 2
    text = text_module.CalibrationText(
        text.source, text.sha256, text.train[:cut], text.validation, text.train[cut : 2 * cut]
    )
    if name == "opt-small":  # its tokens are words by number, not those of its tokenizer
        ids = synthetic_opt.words(directory.config["vocab_size"])[: text.train.size * 2]
        halves = ids.reshape(2, -1, text.length)
        text = text_module.CalibrationText(
            text.source, text.sha256, halves[0], text.validation, halves[1]
        )
    with recordings.working_directory(path, f"{name} {tokens}"):
        access_trace.record(TextRun(directory, text, path, None, None), selection)
        found = [
            tuple(access_trace.recorded(directory, path, i, part) for part in access_trace.PARTS)
            for i in range(len(directory.rows.layers))
        ]
    return directory, found


def row_file(name: str, layout: RowLayout, counts: list[int]) -> RowFile:
    """Rows of noise: where a row is decides what a read takes, not what is in it."""
    path = OUT / f"order-{name}-{layout.stride}.safetensors"
    if not path.exists():
        noise = np.random.default_rng(0).integers(0, 256, (64, layout.stride), np.uint8)
        writer = RowFileWriter(path, layout, counts, "noise")
        for layer, count in enumerate(counts):
            blocks = [noise[: min(64, count - at)] for at in range(0, count, 64)]
            writer.write(layer, blocks)
        writer.close()
    return RowFile(path)


def replay(
    reader: RowReader,
    memory: SlotMemory,
    wanted: list[list[np.ndarray]],
    place: list[np.ndarray],
    tokens: range,
) -> dict[str, float]:
    """Read what some tokens lack, layer after layer, as decoding does; figures of a token."""
    reads = [
        [np.sort(at[layer[token]]) for layer, at in zip(wanted, place, strict=True)]
        for token in tokens
    ]
    before, began = reader.stats(), time.perf_counter()
    for token in reads:
        for layer, rows in enumerate(token):
            if rows.size:
                reader.read(layer, rows, np.arange(rows.size), memory.views)
    spent, stats = time.perf_counter() - began, reader.stats() - before
    n = len(tokens)
    return {"ms": 1e3 * spent / n, "requests": stats.requests / n, "MB": stats.bytes_read / n / 1e6}


def measure(
    name: str,
    directory: ModelDirectory,
    halves: list,
    row_bytes: int,
    turns: int,
    per_turn: int,
    engine: str | None,
) -> list[dict]:
    """Every variant at every share of slots."""
    selection = select(directory)
    layout = directory.rows.layout
    provides = selection.provides
    if row_bytes:  # two parts of half a row each, both wanted
        layout, provides = RowLayout.plan(("up", "down"), "F16", row_bytes // 4), None
    counts = [layer.rows for layer in directory.rows.layers]
    file = row_file(name, layout, counts)
    names = [part.name for part in layout.parts]
    parts = [part for part in names if part.split(".")[0] != provides]
    memory = SlotMemory(layout, max(counts), parts=parts)
    identity = [np.arange(count) for count in counts]
    began = time.perf_counter()
    learned = [ordering.places(ordering.by_coactivation(first)) for first, _ in halves]
    often = [ordering.places(np.argsort(-first.sum(axis=0), kind="stable")) for first, _ in halves]
    print(f"  learned in {time.perf_counter() - began:.1f} s", flush=True)
    gap = gap_bytes()
    variants = {
        "as converted, no joining": (identity, 0),
        "as converted": (identity, gap),
        "by use": (often, gap),
        "reordered, no joining": (learned, 0),
        "reordered": (learned, gap),
    }
    readers = {gap: RowReader(file, gap_bytes=gap, engine=engine) for gap in {0, gap}}
    warm([file.path])
    found = []
    for share in SHARES:
        wanted = [
            misses(
                map(np.flatnonzero, second),
                n,
                max(1, round(share * n)),
                make_policy(DEFAULT_POLICY, n),
            )
            for (_, second), n in zip(halves, counts, strict=True)
        ]
        first = round(WARM * len(wanted[0]))
        runs: dict[str, list[dict]] = {label: [] for label in variants}
        span = max(1, min(per_turn, (len(wanted[0]) - first) // turns))
        for turn in range(turns):
            at = first + turn * span
            for label, (place, wide) in variants.items():
                tokens = range(at, at + span)
                runs[label].append(replay(readers[wide], memory, wanted, place, tokens))
        rows = sum(w[t].size for w in wanted for t in range(first, first + turns * span))
        base = statistics.median(run["ms"] for run in runs["as converted"])
        for label, several in runs.items():
            one = {key: statistics.median(run[key] for run in several) for key in several[0]}
            ratios = [
                run["ms"] / other["ms"]
                for run, other in zip(several, runs["as converted"], strict=True)
            ]
            one |= {"share": share, "variant": label, "rows": rows / (turns * span)}
            one |= {"ms over as converted": statistics.median(ratios), "base ms": base}
            found.append(one)
            print(
                f"  {share:4.0%}  {label:26}{one['rows']:8.0f} rows{one['requests']:8.0f} requests"
                f"{one['MB']:8.2f} MB{one['ms']:9.2f} ms  {one['ms over as converted']:.2f}",
                flush=True,
            )
    for reader in readers.values():
        reader.close()
    file.path.unlink()
    return found


def cost(engine: str | None, turns: int = 7) -> dict[str, float]:
    """What a request takes besides its bytes, and a byte: fitted to reads of one to eight rows."""
    layout = RowLayout.plan(("up", "down"), "F16", 4096)
    file = row_file("cost", layout, [16384])
    memory = SlotMemory(layout, COST_ROWS * 8)
    reader = RowReader(file, gap_bytes=0, engine=engine)
    random = np.random.default_rng(0)
    warm([file.path])
    points: list[tuple[float, float]] = []
    for each in (1, 2, 3, 4, 6, 8):
        spent = []
        for _ in range(turns):
            first = np.sort(random.choice(16384 // 16, COST_ROWS, replace=False)) * 16
            rows = (first[:, None] + np.arange(each)).reshape(-1)
            began = time.perf_counter()
            reader.read(0, rows, np.arange(rows.size), memory.views)
            spent.append(time.perf_counter() - began)
        points.append((each * layout.stride, statistics.median(spent) / COST_ROWS))
        print(f"  {points[-1][0] >> 10:4} KiB a request: {1e6 * points[-1][1]:6.1f} us", flush=True)
    slope, request = np.polyfit(*np.array(points).T, 1)
    reader.close()
    file.path.unlink()
    found = {"request us": 1e6 * request, "GB/s": 1e-9 / slope}
    found["gap KiB"] = gap_bytes(max(0.0, request), 1 / slope) / 1024
    print("  " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--tokens", type=int, default=2048, help="both halves together")
    parser.add_argument("--row-bytes", type=int, default=0, help="default: the model's own")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--per-turn", type=int, default=32, help="tokens, at most")
    parser.add_argument("--engine", choices=("aio", "threads"), help="default: the reader's own")
    parser.add_argument("--cost", action="store_true", help="only what a request takes")
    parser.add_argument("--traces", action="store_true", help="only make models and traces")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    results: dict = {"machine": machine_name(), "date": date.today().isoformat()}
    print(f"{results['machine']}, {results['date']}", flush=True)
    if options.cost:
        results["cost"] = cost(options.engine)
    for name in [] if options.cost else options.models.split(","):
        if name not in MODELS:
            sys.exit(f"no model {name}; expected some of {', '.join(MODELS)}")
        directory, halves = traces(name, options.tokens)
        active = statistics.mean(float(second.mean()) for _, second in halves)
        stride = options.row_bytes or directory.rows.layout.stride
        wanted = wanted_bytes(directory.rows.layout, select(directory).provides)
        print(
            f"\n{name}: {len(halves)} layers of {halves[0][0].shape[1]} rows of {stride} bytes "
            f"({wanted if not options.row_bytes else stride} read), "
            f"{100 * active:.1f} % asked for by a token; {len(halves[0][0])} tokens to learn from"
        )
        if not options.traces:
            key = f"{name}, {stride} bytes"
            results[key] = measure(
                name,
                directory,
                halves,
                options.row_bytes,
                options.turns,
                options.per_turn,
                options.engine,
            )
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()

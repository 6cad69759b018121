"""Single rows from all over a file, as the row cache reads them, against fio's random reads.

A row file of OPT-6.7B's rows (16 KiB: up and down of a neuron in float16), several layers of it;
``RowReader.read`` fetches a random set of rows of one layer after the other, planning, handing out
and waiting included. fio reads the same file at random, 16 KiB a request, direct, as many threads.
The two take turns, since the disk drifts; the ratio is the median of the pairs'. The processor's
time per request is printed, too: on a busy machine it is what slows reading.

    python -m benchmarks.storage.random_reads                      # 2.1 GB under benchmarks/out
    python -m benchmarks.storage.random_reads --layers 2 --pairs 3 --rows 400 --engine threads

Knows: the reader, fio. Does not know: models, caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.support import fio
from benchmarks.support.fio import warm
from benchmarks.support.machine import OUT, machine_name
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_file import RowFile
from mlx_flash.storage.row_layout import RowLayout
from mlx_flash.storage.row_writer import RowFileWriter

WIDTH, ROWS = 4096, 16384  # of OPT-6.7B
BLOCK = 1024
ROUNDS = 64  # sets of rows, made beforehand


def row_file(layers: int) -> RowFile:
    """Rows of random bytes."""
    path = OUT / f"random-rows-{layers}.safetensors"
    layout = RowLayout.plan(("up", "down"), "F16", WIDTH)
    if not path.exists():
        noise = np.random.default_rng(0).integers(0, 256, (BLOCK, layout.stride), np.uint8)
        temporary = path.with_suffix(".writing")
        writer = RowFileWriter(temporary, layout, [ROWS] * layers, "random")
        for layer in range(layers):
            writer.write(layer, (noise for _ in range(ROWS // BLOCK)))
        writer.close()
        temporary.replace(path)
    return RowFile(path)


def ours(reader: RowReader, memory: SlotMemory, sets: list[np.ndarray], seconds: float) -> dict:
    """One run of reading."""
    before, cpu, began = reader.stats(), time.process_time(), time.perf_counter()
    rounds = 0
    while (spent := time.perf_counter() - began) < seconds:
        rows = sets[rounds % len(sets)]
        layer = rounds % len(reader.file.layers)
        reader.read(layer, rows, np.arange(rows.size), memory.views)
        rounds += 1
    requests = (reader.stats() - before).requests
    return {
        "speed": rounds * sets[0].size * reader.file.layout.stride / spent,
        "cpu": (time.process_time() - cpu) / requests,
        "rows": rounds * sets[0].size / requests,
    }


def measure(file: RowFile, count: int, pairs: int, seconds: int, engine: str | None) -> dict:
    """Sets of ``count`` rows against fio."""
    random = np.random.default_rng(0)
    sets = [np.sort(random.choice(ROWS, count, replace=False)) for _ in range(ROUNDS)]
    memory = SlotMemory(file.layout, count)
    reader = RowReader(file, engine=engine)
    warm([file.path])
    runs, theirs = [], []
    for _ in range(pairs):
        runs.append(ours(reader, memory, sets, seconds))
        theirs.append(
            fio.bytes_per_second(file.path, file.layout.stride, reader.threads, "randread", seconds)
        )
    direct, engine = reader.direct, reader.engine
    reader.close()
    return {
        "ratio": statistics.median(r["speed"] / f for r, f in zip(runs, theirs, strict=True)),
        "MB/s": [round(r["speed"] / 1e6) for r in runs],
        "fio MB/s": [round(f / 1e6) for f in theirs],
        "processor us/request": round(1e6 * statistics.median(r["cpu"] for r in runs), 1),
        "rows/request": round(runs[0]["rows"], 2),
        "direct": direct,
        "engine": engine,
        "load": [round(x, 1) for x in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", default="100,400,1600", help="of a read, comma-separated")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=2, help="of each run")
    parser.add_argument("--engine", choices=("aio", "threads"), help="default: the reader's own")
    options = parser.parse_args()
    fio.require()
    OUT.mkdir(exist_ok=True)
    file = row_file(options.layers)
    results = {"machine": machine_name(), "date": date.today().isoformat()}
    print(f"{results['machine']}, {results['date']}; {Path(file.path).stat().st_size / 1e9:.1f} GB")
    for count in map(int, options.rows.split(",")):
        results[f"{count} rows"] = measure(
            file, count, options.pairs, options.seconds, options.engine
        )
        print(f"\n{count} rows of {ROWS} a read", flush=True)
        for label, value in results[f"{count} rows"].items():
            print(f"  {label:<22} {value}", flush=True)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()

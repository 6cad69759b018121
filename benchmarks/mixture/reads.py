"""``reads`` and ``requests``: decoding's own reads against the disk's, and cut in other sizes."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.support import fio
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.storage import huge_pages
from mlx_flash.storage.direct_io import open_direct
from mlx_flash.storage.reader import RowReader

from .bench import Bench

TARGET = 0.9


def reads(bench: Bench) -> dict:
    """Decoding's own reads, alone and into its own slots, against fio's random reads in turns.

    fio has ordinary pages, and its speed jumps by a factor of up to four between runs. ``bare`` is
    ``os.preadv`` of the same size and depth into huge ones, never waiting for a whole layer's reads
    as decoding has to: the stricter yardstick.
    """
    seen = bench.decode(bench.take(bench.options.tokens))
    reader, path = bench.model.flash.reader, bench.directory.rows.path
    pieces = -(-bench.stride // reader.request_bytes)
    block = -(-bench.stride // pieces // 4096) * 4096
    depth = round(statistics.mean(pieces * rows.size for _, rows, _ in seen.reads))
    total = sum(rows.size for _, rows, _ in seen.reads) * bench.stride
    ours, theirs, bare = [], [], []
    for _ in range(bench.repeats):
        ours.append(total / bench.replay(seen.reads, reader))
        theirs.append(fio.bytes_per_second(path, block, depth, "randread"))
        bare.append(_bare(path, block, depth, total // block))
    return {
        "MB/token": total / seen.tokens / 1e6,
        "experts a read": statistics.mean(rows.size for _, rows, _ in seen.reads),
        "request": block,
        "under way": depth,
        "MB/s": [round(x / 1e6) for x in ours],
        "fio MB/s": [round(x / 1e6) for x in theirs],
        "bare MB/s": [round(x / 1e6) for x in bare],
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "ratio to bare": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
        "target": TARGET,
    }


def _bare(path: Path, block: int, depth: int, count: int, space: int = 512 << 20) -> float:
    """Bytes per second of random reads into huge pages, as much memory as slots are, or nearly."""
    fd, _ = open_direct(path)
    places = np.random.default_rng().integers(0, (path.stat().st_size - block) // 4096, count)
    buffers = huge_pages.buffers(space // block, block // 4096 * 4096)
    for buffer in buffers:
        buffer[:] = 0
    work = iter(zip((4096 * places).tolist(), itertools.cycle(buffers), strict=False))

    def read(_: int) -> int:
        return sum(os.preadv(fd, [buffer], at) for at, buffer in work)

    with ThreadPoolExecutor(depth) as pool:
        began = time.perf_counter()
        total = sum(pool.map(read, range(depth)))
        seconds = time.perf_counter() - began
    os.close(fd)
    return total / seconds


def requests(bench: Bench) -> dict:
    """The same reads cut into requests of other sizes, into huge pages and ordinary ones."""
    seen = bench.decode(bench.take(bench.options.tokens))
    file, caches = bench.directory.rows, bench.caches
    most = max(cache.slots.table.capacity for cache in caches.values())
    memories = {"huge": SlotMemory(file.layout, most)}
    ask, huge_pages.ask_for = huge_pages.ask_for, lambda memory: False
    try:
        memories["ordinary"] = SlotMemory(file.layout, most)
    finally:
        huge_pages.ask_for = ask
    total = sum(rows.size for _, rows, _ in seen.reads) * bench.stride
    readers = {
        kib: RowReader(file, request_bytes=kib << 10) for kib in (256, 512, 1024, 2048, 4096)
    }
    speeds: dict[tuple[str, int], list[float]] = {}
    for _ in range(bench.repeats):
        for pages, memory in memories.items():
            for kib, reader in readers.items():
                began = time.perf_counter()
                for layer, rows, slots in seen.reads:
                    reader.read(layer, rows, slots, memory.views)
                speed = total / (time.perf_counter() - began)
                speeds.setdefault((pages, kib), []).append(round(speed / 1e6))
    for reader in readers.values():
        reader.close()
    found: dict = {}
    for (pages, kib), values in speeds.items():
        row = found.setdefault(f"{pages} pages, MB/s (least, most)", {})
        row[f"{kib} KiB"] = [statistics.median(values), min(values), max(values)]
    return found

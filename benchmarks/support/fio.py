"""How fast the disk is: by fio, and by reading files through."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mlx_flash.storage.direct_io import open_direct
from mlx_flash.storage.huge_pages import buffers as huge_buffers

MISSING = "fio is not installed (Debian: apt-get install fio)"
BLOCK, STREAMS = 2 << 20, 8  # of sequential reads: bytes of a request, threads


def warm(paths: list[Path]) -> list[float]:
    """Read files through, past our own page cache, until that gets no faster; GB/s of each pass.

    What lies below a virtual disk has caches of its own: on the machine measured what had not been
    read for a while came at a tenth of its later speed.
    """
    speeds: list[float] = []
    while len(speeds) < 2 or (speeds[-1] > 1.2 * speeds[-2] and len(speeds) < 6):
        seconds, nbytes = read_through(paths)
        speeds.append(nbytes / seconds / 1e9)
    return speeds


def read_through(paths: list[Path], share: float = 1) -> tuple[float, int]:
    """Read a share of some files from their beginning, direct, into huge pages: seconds, bytes."""
    files = [(open_direct(path)[0], path.stat().st_size) for path in paths]
    blocks = iter(
        [(fd, at) for fd, size in files for at in range(0, max(BLOCK, int(share * size)), BLOCK)]
    )

    def work(buffer: np.ndarray) -> int:
        return sum(os.preadv(fd, [buffer], at) for fd, at in blocks)

    buffers = huge_buffers(STREAMS, BLOCK)
    with ThreadPoolExecutor(STREAMS) as pool:
        began = time.perf_counter()
        total = sum(pool.map(work, buffers))
        seconds = time.perf_counter() - began
    for fd, _ in files:
        os.close(fd)
    return seconds, total


def require() -> None:
    """End the program where fio is missing, before anything is made or measured."""
    if not shutil.which("fio"):
        sys.exit(f"{MISSING}; nothing was run")


def bytes_per_second(
    path: Path, block: int, threads: int, pattern: str = "read", seconds: int = 2
) -> float:
    """Bytes per second of direct reads by ``threads`` threads with requests of ``block`` bytes."""
    if not shutil.which("fio"):
        raise RuntimeError(MISSING)
    share = path.stat().st_size // threads // block * block
    command = [
        "fio", "--name=bench", f"--filename={path}", f"--rw={pattern}", f"--bs={block}",
        "--direct=1", "--ioengine=psync", "--thread", f"--numjobs={threads}", f"--size={share}",
        f"--offset_increment={share}", f"--runtime={seconds}", "--time_based", "--readonly",
        "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"]

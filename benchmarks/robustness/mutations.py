"""Damaged and hostile models by the thousand: does anything but a FlashError come out?

    python -m benchmarks.robustness.mutations --count 20000 --seed 1

Each mutation changes one file of a tiny model (a checkpoint, a GGUF, a model directory with
predictors or experts.json), which is then converted, opened, described, hashed, loaded and run for
two tokens. A worker process does it, with a limit on its address space; a mutation that takes
longer than ``--seconds`` is a hang, and the worker is killed. What counts:

    refused     a FlashError (what is expected), or an OSError that the command line tells in a line
    ran         to the end: the change did no harm, or only to numbers
    traceback   any other exception
    memory      MemoryError, or a worker that has grown by more than ``--memory``
    hang, died  no answer in time; ended by a signal

The last line is JSON. ``--only SUBJECT:NUMBER`` runs one mutation again, with its traceback.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import FlashError

ROOT = Path(__file__).parents[2]
BAD = ("traceback", "memory", "hang", "died")


def run_one(subjects: Any, seed: int, number: int, folder: Path, loud: bool = False) -> dict:
    """One mutation, in this process: what came of it."""
    from .subjects import changed_copy

    rng = random.Random(f"{seed}-{number}")
    name = list(subjects)[number % len(subjects)]
    subject = subjects[name]
    found = {"subject": name, "number": number, "outcome": "ran", "said": ""}
    found["file"] = changed_copy(subject, folder, rng)
    start = time.perf_counter()
    try:
        subject.use(folder / "model")
    except FlashError as error:
        found |= {"outcome": "refused", "said": str(error)[:200]}
        if (lines := str(error).count("\n")) > 25 or len(str(error)) > 8000:
            found |= {"outcome": "traceback", "said": f"a message of {lines} lines"}
    except MemoryError:
        found |= {"outcome": "memory", "said": "MemoryError"}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "mlx_flash" in frame.filename] or list(where)
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        said = f"{type(error).__name__} at {at}: {str(error)[:160]}"
        found |= {"outcome": "traceback", "said": said}
        if loud:
            traceback.print_exc()
    found["seconds"] = time.perf_counter() - start
    return found


def work(folder: Path, seed: int, memory: int) -> None:
    """A worker: numbers come in, a line of JSON for each goes out."""
    from .subjects import make_subjects

    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    base = Path(tempfile.mkdtemp(dir=folder))
    (base / "subjects").mkdir()
    subjects = make_subjects(base / "subjects")
    for subject in subjects.values():  # what is not changed works, and kernels are compiled
        _use_unchanged(subject, base / "copy")
    system = current_platform()
    before = system.process_bytes()
    if system.name == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, resource.RLIM_INFINITY))
    print(json.dumps({"subjects": list(subjects)}), file=out, flush=True)
    for line in sys.stdin:
        found = run_one(subjects, seed, int(line), base / "copy")
        found["grown"] = system.peak_process_bytes() - before
        if found["grown"] > memory:
            found["outcome"] = "memory"
        print(json.dumps(found), file=out, flush=True)


def _use_unchanged(subject: Any, folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(subject.path, folder / "model")
    subject.use(folder / "model")


class Worker:
    """A worker process, started anew where it hangs or dies."""

    def __init__(self, folder: Path, seed: int, memory: int) -> None:
        self._command = [sys.executable, "-m", __spec__.name, "--worker", str(folder)]
        self._command += ["--seed", str(seed), "--memory", str(memory)]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"},
        )
        if not self._process.stdout.readline():
            raise SystemExit("the worker did not start; run it with --only 0 to see why")

    def ask(self, number: int, seconds: float) -> dict[str, Any]:
        """What comes of a mutation."""
        print(number, file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        outcome = "died" if ready else "hang"
        self.stop()
        said = f"exit code {self._process.returncode}"
        self._start()
        return {"subject": "?", "number": number, "outcome": outcome, "said": said}

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def run(
    count: int,
    seed: int,
    seconds: float,
    memory: int,
    begin: int = 0,
    tell: Callable[[Any], Any] = lambda _found: None,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Run mutations ``begin`` to ``begin + count``; figures, and each that should not have been.

    Args:
        seconds: from which on a mutation hangs.
        memory: bytes by which the worker may grow.
        tell: called with each that should not have been.
        minutes: after which the rest is left out.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    bad, grown, slowest, start = [], 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder), seed, memory)
        try:
            for number in range(begin, begin + count):
                found = worker.ask(number, seconds)
                outcomes[found["outcome"]] += 1
                grown = max(grown, found.get("grown", 0))
                slowest = max(slowest, found.get("seconds", 0.0))
                if found["outcome"] in BAD:
                    bad.append(found)
                    tell(found)
                if time.monotonic() - start > 60 * minutes:
                    break
        finally:
            worker.stop()
    return {
        "mutations": outcomes.total(),
        "seed": seed,
        **{name: outcomes[name] for name in ("refused", "ran", *BAD)},
        "grown_mb": round(grown / 1e6),
        "slowest_seconds": round(slowest, 2),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "bad": bad,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--begin", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="from which on it hangs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then the rest is left out")
    parser.add_argument("--memory", type=parse_ram, default=parse_ram("1.5GB"))
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one of them, here, loudly")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.seed, args.memory)
        return
    if args.only is not None:
        from .subjects import make_subjects

        with tempfile.TemporaryDirectory() as folder:
            (base := Path(folder) / "subjects").mkdir()
            print(run_one(make_subjects(base), args.seed, args.only, Path(folder) / "copy", True))
        return
    limits = (args.seconds, args.memory, args.begin)
    found = run(args.count, args.seed, *limits, functools.partial(print, flush=True), args.minutes)
    print(json.dumps(found | {"bad": len(found["bad"])}))


if __name__ == "__main__":
    main()

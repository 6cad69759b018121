"""A llama larger than its memory: seconds per token of this package and of what people use instead.

One model of TinyLlama-1.1B's shape (``synthetic_llama``), 2.2 GB in float16. Each program runs in a
process and a virtual environment of its own, in a memory cgroup of 75, 50 and 35 % of the file plus
300 MB, the page cache dropped before; and once without a limit. Without a memory cgroup the script
stops.

    ours, streaming    predictor "none": every row read, what the budget holds is kept; SwiGLU
    ours, exact gate   the gate in memory, rows read whose gate is positive; ReLU
    ours, low-rank     the paper's predictors; ReLU
    mlx-lm             dense, mapped and then in memory; SwiGLU
    llama.cpp          llama-cpp-python, mapped GGUF, float16; SwiGLU
    accelerate         transformers with accelerate's disk offload, float16; ReLU
    nunspark, -f16     0.13.0, streams layers; bfloat16, float16; SwiGLU
    nunspark-all       the same with a budget equal to its share; SwiGLU

Both variants have matrices of the same sizes, so a dense program takes the same time for either;
those that know llamas as SwiGLU only are given that one, with a head of its own. The head is fitted
so that each variant's greedy text is the same one, which the script checks. On MLX's CPU back end
bfloat16 is the fastest type, so the MLX programs are given that (rounding the float16 weights), and
nunspark float16 as well, as the checkpoint has it; llama.cpp and accelerate keep float16.

Every program is told to leave a margin below its limit: ours 40 MB (its budget counts all that it
takes, libraries too), nunspark 250 MB under its share of the file (and, to see what happens,
nothing); accelerate is told to offload everything, which is its fastest. The memory shown is the
peak of the group's anonymous memory, sampled, without the page cache.

    python -m benchmarks.comparison.against_others                    # 12 GB of disk, half an hour
    python -m benchmarks.comparison.against_others --small            # 0.1 GB, to try it
    python -m benchmarks.comparison.against_others --only llama.cpp,low-rank --limits 50

Knows: programs, limits, what is measured. Does not know: how the programs are called
(``other_programs``), how the model is made (``synthetic_llama``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.support import fio
from benchmarks.support.cgroup import cgroup, cgroup_root
from benchmarks.support.fio import warm
from benchmarks.support.machine import OUT, machine_name
from benchmarks.support.synthetic_llama import SMALL, Shape, make

HERE = Path(__file__).parent
PACKAGES = {
    "mlx": [],  # the environment that runs this script
    "llama": ["llama-cpp-python", "numpy"],
    "torch": ["torch==2.13.0", "transformers", "accelerate", "safetensors"],
    "nunspark": ["nunspark==0.13.0", "mlx[cpu]==0.32.4", "mlx-lm[cpu]==0.32.2"],
}
EXTRA = 300_000_000  # bytes on top of the model's share: interpreters and libraries
SLACK = 150_000_000  # of ours: a process near its limit loses its own library pages
WHOLE = 8 << 30  # the group of a run without limit; only its memory is counted
TORCH = WHOLE  # all offloaded: what accelerate keeps is mapped, and thrashes (2.3 for 2.05 s)
WATCH = 0.05  # seconds between two looks at the group's memory
LEAST = 30_000_000  # bytes, of a budget that would be less or nothing
PATIENCE, TIMED_OUT = 240, 1000  # seconds for a run; the exit code that says it took longer
SMALL_EXTRA = 350_000_000  # of --small, whose share is less than an interpreter


@dataclass(frozen=True)
class Program:
    """One row of the table.

    Args:
        name: to be shown and chosen by.
        program: its function in ``other_programs``.
        environment: key of ``PACKAGES``.
        model: what it reads, below the model's folder.
        under: bytes that its own budget stays below the limit; None where it has no budget.
        extra: more of its job.
    """

    name: str
    program: str
    environment: str
    model: str
    under: int | None = None
    extra: tuple[tuple[str, Any], ...] = ()


PROGRAMS = (
    Program("streaming", "ours", "mlx", "silu-rows", SLACK, (("predictor", "none"),)),
    Program("gate", "ours", "mlx", "relu-rows", SLACK, (("predictor", "gate"),)),
    Program("low-rank", "ours", "mlx", "relu-rows", SLACK, (("predictor", "low-rank"),)),
    Program("mlx-lm", "mlx-lm", "mlx", "silu-mlx"),
    Program("llama.cpp", "llama.cpp", "llama", "silu.gguf"),
    Program("accelerate", "accelerate", "torch", "relu", TORCH),
    Program("nunspark", "nunspark", "nunspark", "silu-nunspark", EXTRA + 250_000_000),
    Program("nunspark-f16", "nunspark", "nunspark", "silu-nunspark-float16", EXTRA + 250_000_000),
    Program("nunspark-all", "nunspark", "nunspark", "silu-nunspark", EXTRA),
)


def environment(name: str) -> Path | str:
    """The Python of a program's environment, or why it could not be made."""
    if not PACKAGES[name]:
        return Path(sys.executable)
    folder = OUT / "environments" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {', '.join(PACKAGES[name])}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES[name]],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return f"not installed: {done.stderr.strip().splitlines()[-1]}"
        (folder / "ready").touch()
    return python


def prepare(program: Program, model: Path, python: Path) -> None:
    """The program's own form of the model, where it has one."""
    target = model / program.model
    if target.exists():
        return
    plain = model / ("silu" if "float16" in program.model else "silu-mlx")
    if not plain.exists():
        from mlx_lm import convert

        convert(str(model / "silu"), str(plain), dtype="bfloat16")
    if program.program == "nunspark":
        code = "import sys; from nunspark.packer import pack; pack(sys.argv[1], sys.argv[2])"
        done = subprocess.run(
            [str(python), "-c", code, str(plain), str(target)], capture_output=True, text=True
        )
        if done.returncode:
            shutil.rmtree(target, ignore_errors=True)
            raise RuntimeError(done.stderr.strip().splitlines()[-1])


class Watch:
    """The peak of a group's anonymous memory, by looking often."""

    def __init__(self, procs: str) -> None:
        group = Path(procs).parent
        self._stat = group / "memory.stat"
        self._name = "total_rss" if (group / "memory.limit_in_bytes").exists() else "anon"
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._done.wait(WATCH):
            try:
                lines = self._stat.read_text().splitlines()
            except OSError:
                return
            found = dict(line.split() for line in lines)
            self.peak = max(self.peak, int(found[self._name]))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def drop_page_cache() -> bool:
    """Whether it was allowed."""
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def word(output: str) -> str:
    """The message of the exception that ended a program."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (raised or lines or ["no word"])[-1][:200]


def process(python: Path, job: dict[str, Any], limit: int) -> tuple[int, str, int]:
    """Exit code, output and peak of anonymous memory of one program in a group of its own."""
    with cgroup(limit) as group, Watch(group) as watch:
        # The shell enters the group, so that all of the program's memory is counted there.
        start = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', group]
        child = subprocess.Popen(
            [*start, str(python), str(HERE / "other_programs.py"), json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return TIMED_OUT, "", watch.peak
        return child.returncode, output, watch.peak


def run(
    program: Program, model: Path, limit: int | None, options: argparse.Namespace
) -> dict[str, Any]:
    """One program under one limit (None for no limit)."""
    python = environment(program.environment)
    if isinstance(python, str):
        return {"failed": python}
    try:
        prepare(program, model, python)
    except RuntimeError as error:
        return {"failed": f"could not take the model: {error}"}
    config = json.loads((model / "silu" / "config.json").read_text())
    job: dict[str, Any] = {
        "program": program.program,
        "path": str(model / program.model),
        "prompt": config["flash_prompt"],
        "tokens": options.tokens,
        "seconds": options.seconds,
        **dict(program.extra),
    }
    if program.under is not None and (limit is not None or program.program == "nunspark"):
        job["ram"] = max((limit or WHOLE) - program.under, LEAST)
    if program.program == "accelerate":
        job["folder"] = str(OUT / "offload")
        shutil.rmtree(job["folder"], ignore_errors=True)
    result: dict[str, Any] = {"limit": limit, "budget": job.get("ram")}
    reads = model / program.model
    # What lies below a virtual disk has a cache of its own: as warm for each.
    warm(sorted(reads.glob("*.safetensors")) if reads.is_dir() else [reads])
    result["cache_dropped"] = drop_page_cache()
    result["fio"] = fio.bytes_per_second(
        model / "silu-rows" / "ffn_rows.safetensors", 2 << 20, 8, seconds=1
    )
    code, output, result["peak"] = process(python, job, limit or WHOLE)
    if code == TIMED_OUT:
        return result | {"failed": f"not done within {PATIENCE} s"}
    if code < 0:
        return result | {"failed": "killed (out of memory)" if code == -9 else f"signal {-code}"}
    if code:
        return result | {"failed": word(output)}
    found = json.loads(output.strip().splitlines()[-1])
    steps = [b - a for a, b in zip(found["seconds"], found["seconds"][1:], strict=False)]
    same = [a == b for a, b in zip(found["tokens"], config["flash_text"], strict=False)]
    return result | {
        "seconds": statistics.median(steps),
        "spread": [min(steps), max(steps)],
        "read": (found["read"][-1] - found["read"][0]) / len(steps),
        "same": sum(same),
        "tokens": len(same),
        "stats": found.get("stats"),
    }


def middle(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The run of median time among those of earlier rounds and this one."""
    rounds = [*before.get("rounds", []), found]
    done = sorted((x for x in rounds if "seconds" in x), key=lambda x: x["seconds"])
    chosen = done[len(done) // 2] if done else found
    return chosen | {"rounds": rounds}


HEAD = """\
| memory | program | s per token (least to most) | over its own without limit | read per token \
| anonymous memory | tokens right | fio |
|---|---|---|---|---|---|---|---|"""


def line(name: str, found: dict[str, Any], alone: dict[str, Any]) -> str:
    """A run as a row of the table; ``alone`` is the same program's without a limit."""
    limit = found.get("limit")
    start = f"| {'no limit' if limit is None else f'{limit / 1e9:.2f} GB'} | {name} |"
    fio = f"{found['fio'] / 1e9:.1f} GB/s" if "fio" in found else ""
    if "failed" in found:
        return f"{start} {found['failed']} | | | | | {fio} |"
    own = f"{found['seconds'] / alone['seconds']:.2f}" if "seconds" in alone else ""
    return (
        f"{start} {found['seconds']:.3f} ({found['spread'][0]:.3f} to {found['spread'][1]:.3f}) | "
        f"{own} | {found['read'] / 1e6:.0f} MB | {found['peak'] / 1e9:.2f} GB | "
        f"{found['same']} of {found['tokens']} | {fio} |"
    )


def ratios(runs: dict[str, Any]) -> list[str]:
    """What was asked for, as far as it was measured: times as fast, at 50 %."""

    def seconds(name: str, share: str) -> float:
        return runs.get(name, {}).get(share, {}).get("seconds", math.nan)

    asked = [
        ("low-rank against llama.cpp, 50 %", seconds("llama.cpp", "50"), "50", 3),
        ("low-rank against accelerate, 50 %", seconds("accelerate", "50"), "50", 3),
        ("low-rank against nunspark, 50 %", seconds("nunspark", "50"), "50", 4),
        ("low-rank at 50 % against mlx-lm with all memory", seconds("mlx-lm", "100"), "50", 2),
    ]
    lines = [
        f"{what}: {other / seconds('low-rank', share):.2f} times as fast (wanted {least})"
        for what, other, share, least in asked
    ]
    streaming = seconds("nunspark", "50") / seconds("streaming", "50")
    lines.append(f"streaming against nunspark, 50 %: {streaming:.2f} times as fast (wanted 1.3)")
    for name, text in (("low-rank", " (wanted at most 1.5)"), ("llama.cpp", "")):
        grows = seconds(name, "35") / seconds(name, "75")
        lines.append(f"{name} from 75 to 35 %: {grows:.2f} times the time{text}")
    return [text for text in lines if "nan" not in text]


def table(results: dict[str, Any]) -> str:
    """All runs as Markdown."""
    runs = results["runs"]
    lines = [f"{results['machine']}, {results['date']}. {results['command']}", "", HEAD]
    for share in sorted({share for found in runs.values() for share in found}, key=int)[::-1]:
        for name, found in runs.items():
            if share in found:
                lines.append(line(name, found[share], found.get("100", {})))
    return "\n".join([*lines, "", *(f"- {text}" for text in ratios(runs))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="made if it is not there")
    parser.add_argument("--small", action="store_true", help="a model of 0.1 GB")
    parser.add_argument("--only", help="names of programs, with commas between them")
    parser.add_argument("--limits", default="100,75,50,35", help="%% of the file; 100: no limit")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of each program, in turns; the median is shown"
    )
    parser.add_argument("--seconds", type=float, default=45, help="stop a slow program after this")
    parser.add_argument("--results", type=Path, help="JSON file that is added to; a .md beside it")
    options = parser.parse_args()
    if cgroup_root() is None:
        sys.exit("no memory cgroup can be made here (Linux and root are needed); nothing was run")
    fio.require()
    known = {program.name: program for program in PROGRAMS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no programs {', '.join(unknown)}; there are {', '.join(known)}")
    model = options.model or OUT / ("llama-small" if options.small else "llama-1.1b")
    make(model, SMALL if options.small else Shape())
    size = sum(file.stat().st_size for file in (model / "silu").glob("*.safetensors"))
    extra = SMALL_EXTRA if options.small else EXTRA
    results: dict[str, Any] = {}
    if options.results and options.results.exists():
        results = json.loads(options.results.read_text())
    results |= {
        "machine": machine_name(),
        "date": date.today().isoformat(),
        "command": "`python -m benchmarks.comparison.against_others`",
        "file_bytes": size,
    }
    runs = results.setdefault("runs", {})
    print(f"{results['machine']}, {results['date']}; the file has {size / 1e9:.2f} GB\n\n{HEAD}")
    for share, turn in itertools.product(options.limits.split(","), range(options.rounds)):
        limit = None if share == "100" else int(size * int(share) / 100) + extra
        for name in names:
            if limit is None and name == "nunspark-all":  # the same as nunspark
                continue
            found = run(known[name], model, limit, options)
            kept = runs.setdefault(name, {})
            kept[share] = middle(kept.get(share, {}) if turn else {}, found)
            print(line(name, found, runs[name].get("100", {})), flush=True)
            if options.results:
                options.results.parent.mkdir(exist_ok=True)
                options.results.write_text(json.dumps(results, indent=1) + "\n")
                options.results.with_suffix(".md").write_text(table(results))
    print("", *([] if options.small else ratios(runs)), "", json.dumps(results), sep="\n")


if __name__ == "__main__":
    main()

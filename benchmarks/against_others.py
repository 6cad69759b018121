"""A llama larger than its memory: seconds per token of this package and of what people use instead.

One model of TinyLlama-1.1B's shape (``relu_llama``), 2.2 GB in float16. Each program runs in a
process and a virtual environment of its own, in a memory cgroup of 75, 50 and 35 % of the file plus
300 MB, the page cache dropped before; and once without a limit. Without a memory cgroup the script
stops.

    ours, streaming    predictor "none": every row read, what the budget holds is kept; SwiGLU
    ours, exact gate   the gate in memory, rows read whose gate is positive; ReLU
    ours, low-rank     the paper's predictors; ReLU
    mlx-lm             dense, mapped and then in memory; SwiGLU
    llama.cpp          llama-cpp-python, mapped GGUF, float16; SwiGLU
    accelerate         transformers with accelerate's disk offload, float16; SwiGLU
    nunspark           0.13.0, streams layers; SwiGLU

Both variants have matrices of the same sizes, so a dense program takes the same time for either;
those that know llamas as SwiGLU only are given that one, with a head of its own. The head is fitted
so that each variant's greedy text is the same one, which the script checks. On MLX's CPU back end
bfloat16 is the fastest type, so the MLX programs are given that; the others keep float16.

Every program is told to leave a margin below its limit: ours 150 MB, nunspark 250 MB under its
share (and, to see what happens, nothing), accelerate what its libraries take. Memory told is the
peak of the group's anonymous memory, sampled; page cache is not in it.

    python benchmarks/against_others.py                    # 12 GB of disk, half an hour
    python benchmarks/against_others.py --small            # 0.1 GB, to try it
    python benchmarks/against_others.py --only llama.cpp,low-rank --limits 50

Knows: programs, limits, what is measured. Does not know: how the programs are called
(``other_programs``), how the model is made (``relu_llama``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import common
from common import OUT
from relu_llama import SMALL, Shape, make

HERE = Path(__file__).parent
PACKAGES = {
    "mlx": [],  # the environment that runs this script
    "llama": ["llama-cpp-python", "numpy"],
    "torch": ["torch==2.13.0", "transformers", "accelerate", "safetensors"],
    "nunspark": ["nunspark==0.13.0", "mlx[cpu]>=0.32.4,<0.33", "mlx-lm>=0.32.2,<0.33"],
}
EXTRA = 300_000_000  # bytes on top of the model's share: interpreters and libraries
SLACK = 150_000_000  # of ours: a process near its limit loses its own library pages
TORCH = 650_000_000  # what torch and transformers take, and what a layer does on its way
WATCH = 0.05  # seconds between two looks at the group's memory


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
    Program("accelerate", "accelerate", "torch", "silu", TORCH),
    Program("nunspark", "nunspark", "nunspark", "silu-nunspark", EXTRA + 250_000_000),
    Program("nunspark, all", "nunspark", "nunspark", "silu-nunspark", EXTRA),
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
    plain = model / "silu-mlx"
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


def drop_page_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def run(
    program: Program, model: Path, limit: int | None, tokens: int, config: dict[str, Any]
) -> dict[str, Any]:
    """One program under one limit (None for no limit)."""
    python = environment(program.environment)
    if isinstance(python, str):
        return {"failed": python}
    try:
        prepare(program, model, python)
    except RuntimeError as error:
        return {"failed": f"could not take the model: {error}"}
    job: dict[str, Any] = {
        "program": program.program,
        "path": str(model / program.model),
        "prompt": config["flash_prompt"],
        "tokens": tokens,
        **dict(program.extra),
    }
    whole = 8 << 30
    if program.under is not None and (limit is not None or program.program == "nunspark"):
        job["ram"] = (limit or whole) - program.under
    if program.program == "accelerate":
        job["folder"] = str(OUT / "offload")
        shutil.rmtree(job["folder"], ignore_errors=True)
    drop_page_cache()
    with common.cgroup(limit or whole) as group, Watch(group) as watch:
        command = [str(python), str(HERE / "other_programs.py"), json.dumps(job)]
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-c", common.RUNNER, group, *command],
                check=True,
                capture_output=True,
                text=True,
                timeout=600,
            )
        except subprocess.TimeoutExpired:
            return {"failed": "not done within 10 minutes"}
    code, output, _ = json.loads(done.stdout)
    result: dict[str, Any] = {"peak": watch.peak, "budget": job.get("ram")}
    if code == -9:
        return result | {"failed": "killed: out of memory"}
    if code:
        return result | {"failed": (output.strip().splitlines() or ["no word"])[-1]}
    found = json.loads(output.strip().splitlines()[-1])
    steps = [b - a for a, b in zip(found["seconds"], found["seconds"][1:], strict=False)]
    want = config["flash_text"][:tokens]
    return result | {
        "seconds": statistics.median(steps),
        "spread": [min(steps), max(steps)],
        "read": (found["read"][-1] - found["read"][0]) / len(steps),
        "same": sum(a == b for a, b in zip(found["tokens"], want, strict=False)),
        "tokens": tokens,
        "wall": time.perf_counter() - began,
    }


def line(name: str, limit: str, found: dict[str, Any], alone: dict[str, Any] | None) -> str:
    start = f"| {limit} | {name} |"
    if "failed" in found:
        return f"{start} {found['failed']} | | | | |"
    own = "" if not alone or "failed" in alone else f"{found['seconds'] / alone['seconds']:.2f}"
    return (
        f"{start} {found['seconds']:.3f} ({found['spread'][0]:.3f} to {found['spread'][1]:.3f}) | "
        f"{own} | {found['read'] / 1e6:.0f} MB | {found['peak'] / 1e9:.2f} GB | "
        f"{found['same']} of {found['tokens']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="made if it is not there")
    parser.add_argument("--small", action="store_true", help="a model of 0.1 GB")
    parser.add_argument("--only", help="names of programs, with commas between them")
    parser.add_argument("--limits", default="100,75,50,35", help="%% of the file; 100: no limit")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--results", type=Path, help="JSON file that results are added to")
    options = parser.parse_args()
    if common.cgroup_root() is None:
        sys.exit("no memory cgroup can be made here (Linux and root are needed); nothing was run")
    known = {program.name: program for program in PROGRAMS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no programs {', '.join(unknown)}; there are {', '.join(known)}")
    model = options.model or OUT / ("llama-small" if options.small else "llama-1.1b")
    make(model, SMALL if options.small else Shape())
    config = json.loads((model / "silu" / "config.json").read_text())
    size = sum(file.stat().st_size for file in (model / "silu").glob("*.safetensors"))
    results: dict[str, Any] = {}
    if options.results and options.results.exists():
        results = json.loads(options.results.read_text())
    results |= {"machine": common.machine(), "date": date.today().isoformat(), "file_bytes": size}
    runs = results.setdefault("runs", {})
    disk = results.setdefault("fio_bytes_per_second", {})
    print(f"{results['machine']}, {results['date']}; the file has {size / 1e9:.2f} GB\n")
    print("| memory | program | s per token | of its own without limit | read per token | anonymous")
    for share in options.limits.split(","):
        limit = None if share == "100" else int(size * int(share) / 100) + EXTRA
        disk[share] = common.fio(model / "silu-rows" / "ffn_rows.safetensors", 2 << 20, 8)
        shown = "no limit" if limit is None else f"{share} %, {limit / 1e9:.2f} GB"
        print(f"fio, 2 MiB direct reads by 8 threads: {disk[share] / 1e9:.2f} GB/s", flush=True)
        for name in names:
            found = run(known[name], model, limit, options.tokens, config)
            runs.setdefault(name, {})[share] = found
            print(line(name, shown, found, runs[name].get("100")), flush=True)
            if options.results:
                options.results.parent.mkdir(exist_ok=True)
                options.results.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()

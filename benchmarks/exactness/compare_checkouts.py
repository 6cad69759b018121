"""Whether two checkouts do the same: files, tokens, keys of figures, exit codes.

Each checkout converts and runs the same checkpoints in processes of its own, in this Python
environment. Compared are the SHA-256 of every file of the model directories, predictors, reordered
directories, Core ML exports; greedy tokens (streamed, cached, under a small budget, all
resident, dense); keys of ``--stats`` and of the JSON that ``inspect``, ``plan``, ``reorder`` and
``calibrate`` give; exit codes. Ends with 1 where anything differs.

    python -m benchmarks.exactness.compare_checkouts OLD NEW [--quick] [--only llama,mixtral]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.support.machine import OUT

from .checkout_probe import PROMPT, TOKENS, hashes, keys_of
from .compared_models import CASES, Case

PROBE = Path(__file__).with_name("checkout_probe.py")
WORK = OUT / "compare"
CONTEXT = 128
MARGIN = 1.02  # of a small budget over the least: a process does not always take the same

WORKING = (
    "convert",
    "verify",
    "inspect",
    "generate",
    "small budget",
    "calibrate",
    "reorder",
    "export",
)

Found = dict[str, dict[str, Any]]


class Checkout:
    """A checkout, and processes that run with it."""

    def __init__(self, name: str, root: Path, work: Path) -> None:
        self.name, self.root, self.work = name, root.resolve(), work
        home = str(work / "home")  # what is measured of disks is kept there, apart from the user's
        self.environment = {
            **os.environ, "PYTHONPATH": str(self.root), "HOME": home, "XDG_CACHE_HOME": home,
            "OPENBLAS_NUM_THREADS": "1",  # predictors are fitted by numpy: sums in one order
        }  # fmt: skip
        where = self.python("-c", "import mlx_flash; print(mlx_flash.__file__)").stdout.strip()
        if not Path(where).is_relative_to(self.root):
            sys.exit(f"{self.root} is no checkout: mlx_flash comes from {where}")

    def python(self, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run Python with this checkout's packages."""
        return subprocess.run(
            [sys.executable, "-P", *args],
            env=self.environment,
            cwd=self.work,
            capture_output=True,
            text=True,
            **kwargs,
        )

    def commit(self) -> str | None:
        """The commit that is checked out; None where files differ from it."""
        git = ["git", "-C", str(self.root)]
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        if state.returncode or state.stdout:
            return None
        done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip()

    def run(self, case: Case, source: Path, small: int | None) -> tuple[Found, int]:
        """What this checkout makes of a case, and its small budget in bytes.

        Args:
            small: budget to run with; None takes a little more than this checkout's least.
        """
        out = self.work / self.name / case.name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        job = {"source": str(source), "out": str(out)}
        job |= {k: v for k, v in vars(case).items() if k not in ("source", "quick", "name")}
        done = self.python(str(PROBE), input=json.dumps(job))
        (out / "log.txt").write_text(done.stderr)
        if done.returncode:
            sys.exit(f"{self.name}, {case.name}:\n{done.stderr[-3000:]}")
        found: Found = json.loads(done.stdout.splitlines()[-1])
        if small is None:
            asked = ("inspect", "--model", str(out / "model"), "--context", str(CONTEXT), "--json")
            least = json.loads(self.python("-m", "mlx_flash", *asked).stdout)["least_bytes"]
            small = int(MARGIN * least)
        for label, ram in (("small budget", small), ("all resident", 4_000_000_000)):
            self.generate(found, out, label, ram)
        if case.export is not None:
            self.export(found, source, out / "exported", case.export)
        for folder in ("model", "calibrated", "reordered", "exported"):
            shutil.rmtree(out / folder, ignore_errors=True)
        return found, small

    def export(self, found: Found, source: Path, out: Path, flags: tuple[str, ...]) -> None:
        """``coreml_export`` of the checkpoint; its exit code and files go into ``found``."""
        done = self.python("-m", "coreml_export", str(source), "-o", str(out), *flags)
        found["exits"]["export"] = done.returncode
        (out.parent / "export.txt").write_text(done.stderr)
        found["files"] |= {f"exported/{name}": value for name, value in hashes(out).items()}

    def generate(self, found: Found, out: Path, label: str, ram: int) -> None:
        """``generate --ram`` in a process of its own; what comes out goes into ``found``."""
        stats = out / "stats.json"
        stats.unlink(missing_ok=True)
        done = self.python(
            "-m", "mlx_flash", "generate", "--model", str(out / "model"), "--prompt", PROMPT,
            "--max-tokens", str(TOKENS), "--stats", str(stats), "--ram", str(ram),
        )  # fmt: skip
        found["exits"][label] = done.returncode
        if done.returncode:
            (out / f"{label}.txt").write_text(done.stderr)
            return
        result = json.loads(stats.read_text())
        found["tokens"][label] = [result["tokens"], result["text"]]
        del result["flash"]["planned_bytes"]  # its lines follow the memory that a process takes
        found["keys"][label] = keys_of(result)


def differences(old: Found, new: Found) -> list[str]:
    """What is not the same, one line each."""
    lines = []
    for group in old:
        for label in sorted(old[group].keys() | new[group].keys()):
            before, after = old[group].get(label), new[group].get(label)
            if before != after:
                lines.append(
                    f"{group}, {label}:\n    old {_short(before)}\n    new {_short(after)}"
                )
    return lines


def failures(found: Found) -> list[str]:
    """Runs that were to work and did not, one line each: where both fail, nothing was compared."""
    lines = [
        f"{label}: exit {found['exits'][label]}" for label in WORKING if found["exits"].get(label)
    ]
    return lines + [f"{k}: {v}" for k, v in found["tokens"].items() if isinstance(v, str)]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 700 else text[:700] + " ..."


def remembered(old: Checkout, case: Case, source: Path) -> Path | None:
    """The file for what a clean checkout makes of a case; None where it has changes."""
    if (commit := old.commit()) is None:
        return None
    files = hashes(source) if source.is_dir() else {source.name: source.stat().st_size}
    what = [commit, files, {k: v for k, v in vars(case).items() if k != "source"}, TOKENS, PROMPT]
    what.append(PROBE.read_text())
    key = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
    return WORK / f"{case.name}-{key}.json"


def compare(case: Case, old: Checkout, new: Checkout, reuse: bool) -> tuple[Found, list[str]]:
    """What the new checkout makes of a case, and where the old one's differs."""
    source = case.source(WORK / "sources" / case.name)
    known = remembered(old, case, source) if reuse else None
    if known and known.exists():
        before, small = json.loads(known.read_text())
    else:
        before, small = old.run(case, source, None)
        if known:
            known.write_text(json.dumps([before, small]))
    after, _ = new.run(case, source, small)
    after = json.loads(json.dumps(after))
    return after, differences(json.loads(json.dumps(before)), after)


def main() -> int:
    """Compare, print a table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="folder of a checkout")
    parser.add_argument("new", type=Path, help="folder of the other one")
    parser.add_argument("--quick", action="store_true", help="without SmolLM2")
    parser.add_argument("--only", help="comma-separated: " + ",".join(case.name for case in CASES))
    parser.add_argument(
        "--reuse", action="store_true", help="take OLD's results of an earlier run, same commit"
    )
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [case.name for case in CASES]
    if unknown := set(wanted) - {case.name for case in CASES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    (WORK / "home").mkdir(parents=True, exist_ok=True)
    old, new = (Checkout(n, getattr(options, n), WORK) for n in ("old", "new"))
    print(f"old {old.root}\nnew {new.root}\n")
    print(f"{'model':<22} files  tokens  keys  exits  seconds  differences")
    total = 0
    for case in CASES:
        if case.name not in wanted or (options.quick and not case.quick):
            continue
        began = time.perf_counter()
        found, different = compare(case, old, new, options.reuse)
        counts = [len(found[group]) for group in ("files", "tokens", "keys", "exits")]
        print(
            "{:<22} {:>5} {:>7} {:>5} {:>6}".format(case.name, *counts),
            f"{time.perf_counter() - began:>8.0f}  {len(different) or 'none'}",
            flush=True,
        )
        for line in [*different, *(f"fails, {line}" for line in failures(found))]:
            print(f"  {line}", flush=True)
        total += len(different)
    print(f"\n{total} differences" if total else "\nno difference")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())

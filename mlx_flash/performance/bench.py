"""Speed and bytes over RAM budgets: each budget in a process of its own, one after the other.

A process of its own has a peak footprint of its own, and slots, buffers and allocators that no
other budget has filled. The prompt and what follows it are the words of a novel, as is told in
``walk``; one run before the timed ones warms everything up, as in mlx_lm.benchmark.

Knows: how runs are started, watched and stopped, what their figures mean. Does not know: flags, how
a run is done (``bench_run``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import Any

from mlx_flash.common.sizes import show
from mlx_flash.runtime.options import PagingOptions

from .budget_forecast import BudgetForecast

SWEEP = 6  # budgets, from the least that works to everything resident
MARGIN = 4_000_000  # bytes: two processes do not take quite the same before a model is loaded
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Settings:
    """What is run under each budget."""

    model: str
    prompt_tokens: int
    gen_tokens: int
    repeats: int
    options: PagingOptions

    @property
    def total(self) -> int:
        """Tokens of all runs under one budget, the one that warms up included."""
        return (self.repeats + 1) * (self.prompt_tokens + self.gen_tokens)

    @property
    def warm(self) -> int:
        """Tokens decoded before the repetition in the middle."""
        return self.gen_tokens * (1 + self.repeats // 2)

    def to_json(self) -> dict[str, Any]:
        """For people's programs."""
        return {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "gen_tokens": self.gen_tokens,
            "repeats": self.repeats,
            "context": self.options.context,
            "predictor": self.options.predictor,
            "policy": self.options.policy_name,
            "window": self.options.window,
        }


def sweep(forecasts: BudgetForecast, machine: int) -> list[int]:
    """Budgets from the least that works to what holds everything, or to what the machine has."""
    low, high = forecasts.least + MARGIN, min(forecasts.most + MARGIN, machine)
    steps = SWEEP - 1
    found = [low + (high - low) * i // steps for i in range(SWEEP)]
    return sorted({max(1, ram) for ram in found})


def run(settings: Settings, ram: int, progress: Progress) -> dict[str, Any]:
    """Figures of one budget in a process of its own: ``measured``, or ``error`` with the reason.

    Whatever ends this call, the process has ended with it.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_flash.performance.bench_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes to this process only, which then ends that one
    )
    last: deque[str] = deque(maxlen=5)
    reader = Thread(target=lambda: last.extend(process.stderr or ()), daemon=True)
    reader.start()
    found: dict[str, Any] = {}
    try:
        if process.stdin:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                options = settings.options.replace(ram=ram)
                json.dump(asdict(replace(settings, options=options)), process.stdin)
        for line in process.stdout or ():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # what a library prints is no line of ours
            if isinstance(said, dict):
                progress(said.pop("done", 0))
                found |= said
        code = process.wait()
    finally:
        _stop(process)
        reader.join(timeout=5)
        if process.stderr and not reader.is_alive():
            process.stderr.close()
    row: dict[str, Any] = {"ram_bytes": ram}
    if "figures" in found:
        return row | {"measured": figures(found["figures"])}
    if "error" in found:
        return row | {"error": found["error"].splitlines()[0].rstrip(":")}
    return row | {"error": _how_it_ended(code, last)}


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe and not pipe.closed:
            with contextlib.suppress(OSError):
                pipe.close()


def _how_it_ended(code: int, last: Sequence[str]) -> str:
    if code == -signal.SIGKILL:
        return "the process was killed, most likely for want of memory"
    if code < 0:
        return f"the process was ended by signal {-code}"
    said = last[-1].strip() if last else "it said nothing"
    return f"the process failed with exit code {code}: {said}"


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """What a run says, per token: medians of its repetitions and their spread."""
    repeats, tokens = found["repeats"], found["tokens"]

    def each(name: str) -> float:
        return statistics.median(one[name] for one in repeats) / tokens

    hits, missing = (sum(one[name] for one in repeats) for name in ("hits", "misses"))
    compute = statistics.median(one["seconds"] - one["wait_seconds"] for one in repeats) / tokens
    return {
        "prefill_tokens_per_second": _spread(found["prefill"]),
        "decode_tokens_per_second": _spread(found["decode"]),
        "ms_per_token": 1e3 * each("seconds"),
        "bytes_per_token": each("bytes_read"),
        "requests_per_token": each("requests"),
        "hit_rate": hits / (hits + missing) if hits + missing else 1.0,
        "read_ms": 1e3 * each("read_seconds"),
        "compute_ms": 1e3 * compute,
        "wait_ms": 1e3 * each("wait_seconds"),
        "peak_footprint_bytes": found["peak_footprint_bytes"],
        "direct": found["direct"],
        "predictor": found["predictor"],
        "kept_layers": found["kept_layers"],
        "streamed_layers": found["streamed_layers"],
        "cached_rows": found["cached_rows"],
        "prompt_chunk_tokens": found["prompt_chunk_tokens"],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def compare(row: dict[str, Any], forecasts: BudgetForecast, settings: Settings) -> dict[str, Any]:
    """A row with what ``plan`` says of its budget, and by how much that is wrong."""
    view = forecasts.view(row["ram_bytes"], warm=settings.warm, count=settings.gen_tokens)
    if view.forecast is None:
        why = {} if "error" in row else {"no_prediction": view.reason}
        return row | {"predicted": None} | why
    predicted = view.forecast.to_json()
    error = None
    if "measured" in row:
        error = predicted["ms_per_token"] / row["measured"]["ms_per_token"] - 1
    return row | {"predicted": predicted, "prediction_error": error}


HEAD = (
    "  RAM budget   prompt tok/s       tokens/s (spread)   read/token  requests   hits"
    "    read  compute    wait       peak   predicted (error)"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table; times in milliseconds per token."""
    start = f"  {show(row['ram_bytes']):>10}"
    if "error" in row:
        return f"{start}   {row['error']}"
    m = row["measured"]
    decode = m["decode_tokens_per_second"]
    spread = f"{decode['median']:.2f} ({decode['least']:.2f} to {decode['most']:.2f})"
    text = (
        f"{start}   {m['prefill_tokens_per_second']['median']:>12.1f}   {spread:>21}"
        f"   {show(m['bytes_per_token']):>10}  {m['requests_per_token']:>8.0f}"
        f"  {100 * m['hit_rate']:>3.0f} %  {m['read_ms']:>6.1f}  {m['compute_ms']:>7.1f}"
        f"  {m['wait_ms']:>6.1f}  {show(m['peak_footprint_bytes']):>9}"
    )
    if predicted := row.get("predicted"):
        speed = predicted["tokens_per_second"]
        return f"{text}   {speed:.2f} ({100 * row['prediction_error']:+.0f} % ms)"
    return f"{text}   {row.get('no_prediction', '')}"

"""What ``mlx_flash plan`` says of a token against what ``mlx_flash bench`` measures.

Four models, five budgets each, from the least that works to everything resident:

    smollm2    SmolLM2-135M (SwiGLU, bfloat16): layers streamed whole
    relu       a random llama with FATReLU, so that about 8 % of the rows fire; the exact gate says
               which
    opt        a random OPT with low-rank predictors, about 10 % of the rows predicted
    mixture    a random mixture of 4 layers of 32 experts, 8 a token, 4 bits

    python -m benchmarks.speed.plan_error
    python -m benchmarks.speed.plan_error --only relu,opt

Knows: how the models are made. Does not know: how anything is planned or measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.mixture.model import checkpoint
from benchmarks.support import synthetic_opt
from benchmarks.support.converted import converted, smollm2
from benchmarks.support.machine import OUT
from benchmarks.support.random_llama import random_llama
from mlx_flash.common.sizes import with_margin
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.performance.budget_forecast import BudgetForecast
from mlx_flash.runtime.options import PagingOptions

TARGET = 0.25
BUDGETS = 5
THRESHOLD = 1.4  # of the gate's outputs, whose standard deviation is 1, 8 % are above


FATRELU = {
    "model_type": "sparsellama",
    "architectures": ["SparseLlamaForCausalLM"],
    "hidden_act": "fatrelu",
    "hidden_act_param": THRESHOLD,
}


def relu() -> Path:
    """A llama with FATReLU: the exact gate says which rows fire."""
    return converted("fatrelu", lambda p: random_llama(p, 1024, 4096, 8, 4096, **FATRELU)).path


def opt() -> Path:
    """An OPT with low-rank predictors."""
    return synthetic_opt.make(OUT / "opt-small", synthetic_opt.SMALL).path


def small_mixture() -> Path:
    """A mixture of 4 layers of 32 experts."""
    return converted("mixture-small", lambda p: checkpoint(p, 4, 4096, "float32", 32)).path


MODELS: dict[str, Callable[[], Path]] = {
    "smollm2": lambda: smollm2("bfloat16").path, "relu": relu, "opt": opt, "mixture": small_mixture,
}  # fmt: skip


def bench(path: Path, options: argparse.Namespace) -> dict:
    """What ``mlx_flash bench`` says of five budgets."""
    forecasts = BudgetForecast(
        ModelDirectory(path), PagingOptions(context=options.prompt + options.gen + 2)
    )
    low, high = forecasts.least + 4_000_000, forecasts.most + 4_000_000
    rams = [with_margin(low + (high - low) * i // (BUDGETS - 1)) for i in range(BUDGETS)]
    file = OUT / f"plan-{path.name}.json"
    command = [
        sys.executable, "-m", "mlx_flash", "bench", "--model", str(path), "--ram",
        ",".join(map(str, rams)), "--prompt-tokens", str(options.prompt), "--gen-tokens",
        str(options.gen), "--repeats", str(options.repeats), "--json", str(file), "--remeasure",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def show(name: str, found: dict) -> bool:
    """Print a model's rows; whether all are within the target."""
    good = True
    for row in found["budgets"]:
        if "error" in row or not row["predicted"]:
            print(
                f"{name:<10}{row['ram_bytes'] / 1e6:>8.0f} MB   {row.get('error', 'no forecast')}"
            )
            good = False
            continue
        said, took = row["predicted"], row["measured"]
        error = row["prediction_error"]
        good &= abs(error) <= TARGET
        print(
            f"{name:<10}{row['ram_bytes'] / 1e6:>8.0f} MB{said['ms_per_token']:>12.1f} ms"
            f"{took['ms_per_token']:>10.1f} ms{100 * error:>+8.0f} %"
            f"{said['bytes_per_token'] / 1e6:>12.2f} MB{took['bytes_per_token'] / 1e6:>9.2f} MB"
            f"{100 * said['hit_rate']:>10.0f} %{100 * took['hit_rate']:>7.0f} %",
            flush=True,
        )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(MODELS), help="names, comma separated")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--gen", type=int, default=24, help="decoded tokens")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--make", action="store_true", help="make the models and stop")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - MODELS.keys():
        sys.exit(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    paths = {name: MODELS[name]() for name in options.only.split(",")}
    if options.make:
        return
    good, first = True, True
    for name, path in paths.items():
        found = bench(path, options)
        if first:
            print(f"{found['machine']}, {found['date']}; milliseconds and bytes per token")
            print(
                f"{'model':<10}{'budget':>11}{'predicted':>15}{'measured':>13}{'error':>10}"
                f"{'bytes':>15}{'measured':>12}{'hits':>12}{'measured':>9}"
            )
            first = False
        good &= show(name, found)
    print(f"target {100 * TARGET:.0f} %: {'met' if good else 'missed'}")


if __name__ == "__main__":
    main()

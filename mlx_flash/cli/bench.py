"""``mlx_flash bench``: speed and bytes over RAM budgets, measured.

Knows: flags, what is printed and drawn. Does not know: how it is run (``bench``).
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import UsageError
from mlx_flash.performance.bench_plot import PLOTS, draw, matplotlib_figure

from .plan import Note, add_paging, check_paging, options_of


def add(commands: Any) -> None:
    """Add the subcommand to the parser's."""
    bench = commands.add_parser("bench", help="measure speed under several RAM budgets")
    bench.add_argument("--model", required=True, help="model directory")
    bench.add_argument(
        "--ram",
        required=True,
        help="budgets such as 400MB,1.5GB, or 'sweep': from the least to everything resident",
    )
    bench.add_argument("--prompt-tokens", "-p", type=int, default=128, help="default: 128")
    bench.add_argument("--gen-tokens", "-g", type=int, default=64, help="default: 64")
    bench.add_argument("--repeats", "-n", type=int, default=3, help="timed runs; default: 3")
    bench.add_argument(
        "--context", type=int, help="tokens to plan the KV cache for; default: what the run takes"
    )
    add_paging(bench)
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there, too")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve: .png, .svg, .pdf")
    bench.add_argument(
        "--remeasure", action="store_true", help="measure anew what the prediction is made from"
    )
    bench.set_defaults(run=run_bench)


def budgets(text: str) -> list[int] | None:
    """The budgets of ``--ram``, in their order; None for a sweep."""
    if text.strip().lower() == "sweep":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"--ram {text!r} has an empty budget in it; write 400MB,1GB or sweep")
    found = [parse_ram(part) for part in parts]
    if len(set(found)) < len(found):
        raise UsageError(f"--ram {text!r} names a budget twice")
    return found


def run_bench(args: argparse.Namespace) -> int:
    """``mlx_flash bench``."""
    wanted = _check(args)
    args.interrupted = "interrupted; the budgets that were finished are above"
    from mlx_flash.model_directory.directory import ModelDirectory

    directory = ModelDirectory(args.model)
    length = args.prompt_tokens + args.gen_tokens
    limit = directory.config.get("max_position_embeddings")
    if limit and length + 2 > limit:
        raise UsageError(
            f"--prompt-tokens {args.prompt_tokens} and --gen-tokens {args.gen_tokens} are more "
            f"than the {limit} positions that the model was made for, less 2 that the loop begins"
        )
    from mlx_flash.common.platform import current_platform
    from mlx_flash.performance import bench
    from mlx_flash.performance.budget_forecast import BudgetForecast

    options = options_of(args, length + 2)
    outlook = BudgetForecast(directory, options)
    settings = bench.Settings(
        args.model, args.prompt_tokens, args.gen_tokens, args.repeats, options
    )
    rams = wanted or bench.sweep(outlook, current_platform().machine_bytes())
    usable = [ram for ram in rams if outlook.view(ram).plan]
    if usable:
        outlook.measure(max(usable), args.remeasure, Note())
    rows: list[dict[str, Any]] = []
    try:
        _run_all(rams, rows, settings, outlook)
    finally:
        _tell(args, rows, settings)
    return 0 if any("measured" in row for row in rows) else 2


def _check(args: argparse.Namespace) -> list[int] | None:
    """Raise UsageError for what cannot work, before anything is run; returns the budgets."""
    check_paging(args)
    for name, least in (("prompt_tokens", 1), ("gen_tokens", 1), ("repeats", 1)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is at least {least}, got {getattr(args, name)}")
    length = args.prompt_tokens + args.gen_tokens
    if args.context is not None and args.context < length + 2:
        raise UsageError(f"--context {args.context}; the run takes {length + 2} tokens")
    found = budgets(args.ram)
    for flag, file in (("--json", args.json), ("--plot", args.plot)):
        if file is not None:
            _check_writable(flag, file)
    if args.plot is not None:
        if args.plot.suffix.lower() not in PLOTS:
            raise UsageError(f"--plot {args.plot}: expected a file that ends in {', '.join(PLOTS)}")
        matplotlib_figure()
    return found


def _check_writable(flag: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise UsageError(f"{flag} {file}: {file.parent} is no directory")
    if file.is_dir():
        raise UsageError(f"{flag} {file} is a directory; give a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"{flag} {file} cannot be written: no permission")


def _run_all(rams: list[int], rows: list[dict[str, Any]], settings: Any, outlook: Any) -> None:
    from tqdm import tqdm

    from mlx_flash.performance import bench

    with tqdm(total=settings.total * len(rams), unit="token", desc="bench", disable=None) as bar:
        for i, ram in enumerate(rams):
            view = outlook.view(ram)
            if view.plan is None:
                rows.append({"ram_bytes": ram, "error": view.reason})
            else:
                found = bench.run(settings, ram, bar.update)
                rows.append(bench.compare(found, outlook, settings))
            bar.n = settings.total * (i + 1)
            bar.refresh()


def _tell(args: argparse.Namespace, rows: list[dict[str, Any]], settings: Any) -> None:
    """Print what was finished, however it ended."""
    if not rows:
        args.interrupted = "interrupted before any budget was finished"
        return
    from mlx_flash.common.platform import current_platform
    from mlx_flash.performance import bench

    print(
        f"{args.model}: {settings.prompt_tokens} prompt tokens, {settings.gen_tokens} decoded, "
        f"median of {settings.repeats}; milliseconds and bytes per decoded token\n{bench.HEAD}"
    )
    for row in rows:
        print(bench.line(row))
    found = {
        "machine": current_platform().machine_name(),
        "date": date.today().isoformat(),
        "settings": settings.to_json(),
        "budgets": rows,
    }
    text = json.dumps(found)
    print(text)
    if args.json is not None:
        from mlx_flash.common.files import replace_text

        replace_text(args.json, text + "\n")
    measured = [row for row in rows if "measured" in row]
    if args.plot is not None and measured:
        draw(args.plot, found, measured)

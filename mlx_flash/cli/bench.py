"""``mlx_flash bench``: speed and bytes over RAM budgets, measured.

Knows: flags, what is printed and drawn. Does not know: how it is run (``performance.bench``).
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from mlx_flash.errors import UsageError

from . import options
from .plan import Note
from .progress import TokenBar


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    options.add_model(parser)
    parser.add_argument(
        "--ram",
        type=budgets,
        required=True,
        help="budgets such as 400MB,1.5GB, or 'sweep': from the least to everything resident",
    )
    for flag, short, default, what in (
        ("--prompt-tokens", "-p", 128, "default: 128"),
        ("--gen-tokens", "-g", 64, "default: 64"),
        ("--repeats", "-n", 3, "timed runs; default: 3"),
    ):
        least = options.at_least(flag, 1)
        parser.add_argument(flag, short, type=least, default=default, help=what)
    options.add_context(parser, "what the run takes")
    options.add_paging(parser)
    parser.add_argument(
        "--json", type=options.writable("--json"), metavar="FILE", help="write the JSON there, too"
    )
    parser.add_argument(
        "--plot", type=plot_file, metavar="FILE", help="draw the curve: .png, .svg, .pdf"
    )
    parser.add_argument(
        "--remeasure", action="store_true", help="measure anew what the prediction is made from"
    )
    parser.set_defaults(run=run)


def budgets(text: str) -> list[int] | None:
    """The budgets of ``--ram``, in their order; None for a sweep."""
    if text.strip().lower() == "sweep":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"--ram {text!r} has an empty budget in it; write 400MB,1GB or sweep")
    found = [options.size(part) for part in parts]
    if len(set(found)) < len(found):
        raise UsageError(f"--ram {text!r} names a budget twice")
    return found


def plot_file(text: str) -> Path:
    """A type for ``--plot``: a file that can be written and drawn into."""
    file = options.writable("--plot")(text)
    from mlx_flash.performance.bench_plot import PLOTS, matplotlib_figure

    if file.suffix.lower() not in PLOTS:
        raise UsageError(f"--plot {file}: expected a file that ends in {', '.join(PLOTS)}")
    matplotlib_figure()
    return file


def run(args: argparse.Namespace) -> int:
    """Run every budget and print what each gave; returns the exit code."""
    length = args.prompt_tokens + args.gen_tokens
    if args.context is not None and args.context < length + 2:
        raise UsageError(f"--context {args.context}; the run takes {length + 2} tokens")
    how = options.paging_options(args, context=args.context or length + 2)
    args.interrupted = "interrupted; the budgets that were finished are above"
    from mlx_flash.model_directory.directory import ModelDirectory

    directory = ModelDirectory(args.model)
    what = f"--prompt-tokens {args.prompt_tokens} and --gen-tokens {args.gen_tokens}"
    loop = ", less 2 that the loop begins"
    options.check_positions(directory.positions, length + 2, what, loop)
    from mlx_flash.common.platform import current_platform
    from mlx_flash.performance import bench
    from mlx_flash.performance.budget_forecast import BudgetForecast

    forecasts = BudgetForecast(directory, how)
    settings = bench.Settings(args.model, args.prompt_tokens, args.gen_tokens, args.repeats, how)
    rams = args.ram or bench.sweep(forecasts, current_platform().machine_bytes())
    usable = [ram for ram in rams if forecasts.view(ram).plan]
    if usable:
        forecasts.measure(max(usable), args.remeasure, Note())
    rows: list[dict[str, Any]] = []
    try:
        _run_all(rams, rows, settings, forecasts)
    finally:
        _tell(args, rows, settings)
    return 0 if any("measured" in row for row in rows) else 2


def _run_all(rams: list[int], rows: list[dict[str, Any]], settings: Any, forecasts: Any) -> None:
    from mlx_flash.performance import bench

    with TokenBar("bench", settings.total, len(rams)) as bar:
        for ram in rams:
            view = forecasts.view(ram)
            if view.plan is None:
                rows.append({"ram_bytes": ram, "error": view.reason})
            else:
                found = bench.run(settings, ram, bar)
                rows.append(bench.compare(found, forecasts, settings))
            bar.ended()


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
        from mlx_flash.performance.bench_plot import draw

        draw(args.plot, found, measured)

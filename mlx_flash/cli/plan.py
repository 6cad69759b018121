"""``mlx_flash plan``: where every byte of a RAM budget goes, and the speed to expect.

Knows: flags, what is printed. Does not know: how it is planned or measured (``budget_forecast``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from mlx_flash.common.sizes import show

from . import options


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    options.add_model(parser)
    options.add_ram(parser, required=True)
    options.add_context(parser, "2048")
    options.add_paging(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--remeasure", action="store_true", help="measure disk and model again, though known"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, measure what is not known yet, print; returns the exit code."""
    how = options.paging_options(args, context=args.context)
    from mlx_flash.model_directory.directory import ModelDirectory

    directory = ModelDirectory(args.model)
    from mlx_flash.performance.budget_forecast import BudgetForecast

    forecasts = BudgetForecast(directory, how)
    forecasts.plan(args.ram)  # before anything is measured: too small a budget is an error
    forecasts.measure(args.ram, args.remeasure, Note())
    found = describe(forecasts, args.ram)
    print(json.dumps(found, indent=2) if args.json else report(found))
    return 0


class Note:
    """Says on stderr what is being measured, where somebody looks at it."""

    def __call__(self, what: str) -> None:
        if sys.stderr.isatty():
            print(f"measuring: {what} ...", file=sys.stderr, flush=True)


def describe(forecasts: Any, ram: int) -> dict[str, Any]:
    """Figures of a budget, half and twice of it, as a JSON-ready dict; sizes in bytes."""
    views = {name: forecasts.view(n) for name, n in budgets(ram).items()}
    plan, directory, disk = views["given"].plan, forecasts.directory, forecasts.disk
    trial, use = forecasts.trial, forecasts.trial.use
    return {
        "path": str(directory.path),
        "unit": directory.unit,
        "layers": len(directory.rows.layers),
        "rows": list(forecasts.layers.rows),
        "predictor": forecasts.selection.kind if forecasts.selection else "none",
        "policy": forecasts.options.policy_name,
        "context": forecasts.needs.context,
        "ram_bytes": ram,
        "least_bytes": forecasts.least,
        "everything_bytes": forecasts.most,
        "planned_bytes": plan.to_json(),
        "kept_layers": list(plan.kept),
        "streamed_layers": list(plan.streamed),
        "slots": {str(layer): n for layer, n in plan.slots.items()},
        "prompt_chunk_tokens": plan.step,
        "budgets": {
            name: {
                "ram_bytes": view.ram,
                "reason": view.reason or None,
                "kept_layers": len(view.plan.kept) if view.plan else None,
                "streamed_layers": len(view.plan.streamed) if view.plan else None,
                "cached_rows": sum(view.plan.slots.values()) if view.plan else None,
                "forecast": view.forecast.to_json() if view.forecast else None,
            }
            for name, view in views.items()
        },
        "measured": {
            "disk": {
                "date": disk.measured,
                "sequential_bytes_per_second": disk.sequential,
                "rows_at_once": list(disk.rows),
                "seconds": list(disk.seconds),
                "direct": forecasts.direct,
            },
            "model": {
                "date": trial.measured,
                "ways": {
                    way: {"ram_bytes": t.ram, "tokens": t.tokens, "overlap": t.overlap}
                    for way, t in trial.ways.items()
                },
                "rows_recorded_on_tokens": use.tokens if use else None,
            },
            "misses_from_calibration": forecasts.uses_curves,
        },
    }


def budgets(ram: int) -> dict[str, int]:
    """The budget, and those that it is held against."""
    return {"half": ram // 2, "given": ram, "twice": 2 * ram}


def report(found: dict[str, Any]) -> str:
    """``describe``'s figures as text."""
    lines = [f"{found['path']} with {show(found['ram_bytes'])}"]
    for label, size in found["planned_bytes"].items():
        lines.append(f"  {size / 1e6:10.1f} MB  {label}")
    total = sum(found["planned_bytes"].values())
    lines.append(f"  {total / 1e6:10.1f} MB  together; {_layers(found)}")
    given = found["budgets"]["given"]
    if f := given["forecast"]:
        lines += [
            "",
            f"A token, once warm: {f['ms_per_token']:.1f} ms, {f['tokens_per_second']:.2f} a "
            f"second; {show(f['bytes_per_token'])} read in {f['requests_per_token']:.0f} requests, "
            f"{100 * f['hit_rate']:.0f} % of its {_unit(found)} in memory",
            f"  reading {f['read_ms']:.1f} ms + computing {f['compute_ms']:.1f} ms "
            f"- both at once {f['overlapped_ms']:.1f} ms",
        ]
    lines += ["", f"  {'RAM budget':>18}   read per token   ms per token   tokens/s"]
    for name, row in found["budgets"].items():
        lines.append(_row(name, row))
    lines.append(
        f"  the least that works is {show(found['least_bytes'])}, everything is resident from "
        f"{show(found['everything_bytes'])} on"
    )
    return "\n".join([*lines, "", *_sources(found)])


def _unit(found: dict[str, Any]) -> str:
    return {"expert": "experts", "layer": "layers"}.get(found["unit"], "rows")


def _layers(found: dict[str, Any]) -> str:
    """How the layers' rows are held."""
    text = f"{len(found['kept_layers'])} of {found['layers']} layers kept"
    if found["streamed_layers"]:
        text += f", {len(found['streamed_layers'])} streamed for every token"
    if slots := found["slots"]:
        text += f", in each of {len(slots)} {_range(list(slots.values()))} slots for "
        text += f"{_range([found['rows'][int(i)] for i in slots])} {_unit(found)}"
    return text


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _row(name: str, row: dict[str, Any]) -> str:
    start = f"  {name if name != 'given' else '':>7} {show(row['ram_bytes']):>10}"
    if not row["forecast"]:
        return f"{start}   {row['reason']}"
    f = row["forecast"]
    return (
        f"{start}   {show(f['bytes_per_token']):>14}   {f['ms_per_token']:>12.1f}"
        f"   {f['tokens_per_second']:>8.2f}"
    )


def _sources(found: dict[str, Any]) -> list[str]:
    """What is measured, and what is assumed."""
    disk, model = found["measured"]["disk"], found["measured"]["model"]
    how = "direct" if disk["direct"] else "through the page cache"
    one = 1e3 * disk["seconds"][0]
    lines = [
        f"Measured: reading this file, {how}: {show(disk['sequential_bytes_per_second'])}/s in "
        f"order, {one:.2f} ms for one row ({disk['date']})",
    ]
    ways = ", ".join(
        f"{way} ({t['tokens']} tokens under {show(t['ram_bytes'])})"
        for way, t in model["ways"].items()
    )
    lines.append(f"  a token of this model, {ways} ({model['date']})")
    if model["rows_recorded_on_tokens"]:
        lines.append(
            f"  which {_unit(found)} are needed, on {model['rows_recorded_on_tokens']} tokens of "
            "Persuasion"
            + ("; misses from experts.json" if found["measured"]["misses_from_calibration"] else "")
        )
    lines += [
        "Assumed: your text needs rows as that one does, the disk stays as fast, the context is",
        "  short (attention over a long one takes longer). --remeasure measures again",
    ]
    return lines

"""``mlx_flash reorder``: rows that are asked for together come to lie near each other."""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import options
from .progress import StageBar

UNITS = {"recording": "token", "writing": "B"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    options.add_model(parser)
    parser.add_argument("--out", help="model directory to make (default: --model is replaced)")
    parser.add_argument(
        "--data",
        metavar="FILE|NAME",
        help="text, as for calibrate (default: a novel that ships with mlx_flash)",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="to learn from (default: 8192)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options.add_ram(parser, "4GB")
    parser.add_argument("--dry-run", action="store_true", help="only measure what it would give")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reorder and print what it gives; returns the exit code."""
    args.interrupted = options.GOES_ON
    from mlx_flash.calibration.reorder.reorder import reorder

    with StageBar("reorder", UNITS, "layer", scaled=("writing",)) as bar:
        found = reorder(
            args.model,
            args.out,
            data=args.data,
            tokens=args.tokens,
            ram=args.ram,
            seed=args.seed,
            dry_run=args.dry_run,
            progress=bar,
        )
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """What ``reorder`` found, as text."""
    what = f"{found['tokens']} tokens of {found['text']}, predictor {found['predictor']}"
    if found["done_before"]:
        return f"The rows are in the order of {what} already; nothing was written"
    lines = [
        f"Learned from {what}; on other text, {100 * found['cache_share']:.0f} % of the rows in "
        "slots, a token reads",
        f"{'':10}{'rows':>10}{'requests':>10}{'MB':>10}",
    ]
    for name in ("before", "after"):
        one = found[name]
        lines.append(
            f"{name:10}{one['rows']:10.0f}{one['requests']:10.0f}{one['bytes'] / 1e6:10.2f}"
        )
    written = found["written"]
    lines.append(f"Saved {written}" if written else "Nothing was written (--dry-run)")
    return "\n".join(lines)

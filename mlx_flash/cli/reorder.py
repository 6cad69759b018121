"""``mlx_flash reorder`` on the command line.

Knows: flags, the progress bar, what is printed. Does not know: how it is done (``reorder``).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from mlx_flash.common.sizes import parse_ram


def add(commands: Any) -> None:
    """Add the command to the subparsers of ``mlx_flash``."""
    parser = commands.add_parser(
        "reorder",
        help="lay rows that are asked for together near each other, so that fewer requests read "
        "them; the model stays the same but for rounding",
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--out", help="model directory to make (default: --model is replaced)")
    parser.add_argument(
        "--data",
        metavar="FILE|NAME",
        help="text, as for calibrate (default: a novel that ships with mlx_flash)",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="to learn from (default: 8192)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--ram", help="what the whole process may take, such as 4GB")
    parser.add_argument("--dry-run", action="store_true", help="only measure what it would give")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_reorder)


def run_reorder(args: argparse.Namespace) -> int:
    """``mlx_flash reorder``."""
    args.interrupted = "interrupted; run the same command again and it goes on where it stopped"
    if args.ram is not None:
        parse_ram(args.ram)
    from tqdm import tqdm

    from mlx_flash.calibration.reorder.reorder import reorder

    units = {"recording": "token", "writing": "B"}
    with tqdm(desc="reorder", disable=None) as bar:
        at: tuple[str, int] = ("", 0)

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal at
            if at[0] != stage or done < at[1]:
                bar.reset(total=total)
                bar.set_description(stage, refresh=False)
                bar.unit, bar.unit_scale = units.get(stage, "layer"), stage == "writing"
                at = (stage, 0)
            bar.update(done - at[1])
            at = (stage, done)

        found = reorder(
            args.model,
            args.out,
            data=args.data,
            tokens=args.tokens,
            ram=args.ram,
            seed=args.seed,
            dry_run=args.dry_run,
            progress=progress,
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

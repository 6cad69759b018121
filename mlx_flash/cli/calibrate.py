"""``mlx_flash calibrate`` on the command line.

Knows: flags, the progress bar. Does not know: how it is done (``calibrate``).
"""

from __future__ import annotations

import argparse
from typing import Any

from mlx_flash.common.sizes import parse_ram
from mlx_flash.predictors import registry


def add(commands: Any) -> None:
    """Add the command to the subparsers of ``mlx_flash``."""
    parser = commands.add_parser(
        "calibrate",
        help="fit predictors to a model directory, so that few rows are read; of a mixture, "
        "measure how to share its memory out over layers",
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument(
        "--data",
        metavar="FILE|NAME",
        help="text, JSON lines or parquet file, or a data set on the hub as owner/name[:file] "
        "(default: a novel that ships with mlx_flash)",
    )
    parser.add_argument(
        "--kind",
        choices=registry.fitted(),
        help="default: low-rank where the activation has zeros, else threshold (lossy)",
    )
    parser.add_argument(
        "--rank", type=_rank, default="auto", help="of low-rank predictors (default: auto)"
    )
    parser.add_argument(
        "--target-recall", type=float, default=0.95, help="share of active rows (default: 0.95)"
    )
    parser.add_argument(
        "--sparsity", type=float, default=0.5, help="rows a threshold leaves out (default: 0.5)"
    )
    parser.add_argument(
        "--nonlinearity",
        choices=registry.NONLINEARITIES,
        default="none",
        help="between the matrices",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.01,
        help="perplexity that low-rank predictors may cost, as a share (default: 0.01)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help="to train on (default: 16384; 4096 for a threshold or a mixture)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--ram", help="what the whole process may take, such as 4GB")
    parser.set_defaults(run=run_calibrate)


def _rank(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number") from None


def run_calibrate(args: argparse.Namespace) -> int:
    """``mlx_flash calibrate``."""
    args.interrupted = "interrupted; run the same command again and it goes on where it stopped"
    if args.ram is not None:
        parse_ram(args.ram)
    from tqdm import tqdm

    from mlx_flash.calibration.calibrate import calibrate
    from mlx_flash.calibration.experts import report as expert_report
    from mlx_flash.calibration.neurons import report

    with tqdm(desc="calibrate", disable=None) as bar:
        at: tuple[str, int] = ("", 0)

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal at
            if at[0] != stage or done < at[1]:
                bar.reset(total=total)
                bar.set_description(stage, refresh=False)
                bar.unit = "layer" if stage in ("fitting", "counting") else "token"
                at = (stage, 0)
            bar.update(done - at[1])
            at = (stage, done)

        found = calibrate(
            args.model,
            args.data,
            kind=args.kind,
            rank=args.rank,
            target_recall=args.target_recall,
            sparsity=args.sparsity,
            nonlinearity=args.nonlinearity,
            tokens=args.tokens,
            ram=args.ram,
            seed=args.seed,
            max_loss=args.max_loss,
            progress=progress,
        )
    mixture = found["settings"]["kind"] == "experts"
    print((expert_report if mixture else report).table(found), end="")
    print(f"Saved {'demand' if mixture else 'predictors'} and report in {args.model}")
    return 0

"""``mlx_flash calibrate``: predictors are fitted to a model directory, by text."""

from __future__ import annotations

import argparse

from mlx_flash.predictors import registry

from . import options
from .progress import StageBar

UNITS = {"fitting": "layer", "counting": "layer"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    options.add_model(parser)
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
    options.add_ram(parser, "4GB")
    parser.set_defaults(run=run)


def _rank(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number") from None


def run(args: argparse.Namespace) -> int:
    """Calibrate and print the report; returns the exit code."""
    args.interrupted = options.GOES_ON
    from mlx_flash.calibration.calibrate import calibrate
    from mlx_flash.calibration.experts import report as expert_report
    from mlx_flash.calibration.neurons import report

    with StageBar("calibrate", UNITS, "token") as bar:
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
            progress=bar,
        )
    mixture = found["settings"]["kind"] == "experts"
    print((expert_report if mixture else report).table(found), end="")
    print(f"Saved {'demand' if mixture else 'predictors'} and report in {args.model}")
    return 0

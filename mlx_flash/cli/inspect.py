"""``mlx_flash inspect`` and ``mlx_flash verify``: what is in a model directory, and is it whole."""

from __future__ import annotations

import argparse
import json
import sys

from mlx_flash.errors import DamagedError

from . import options
from .progress import ByteBar


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``inspect``."""
    options.add_model(parser)
    options.add_context(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def add_verify_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``verify``."""
    options.add_model(parser)
    parser.set_defaults(run=run_verify)


def run(args: argparse.Namespace) -> int:
    """Print what ``inspect`` finds; returns the exit code."""
    from mlx_flash.model_directory.directory import ModelDirectory
    from mlx_flash.runtime.options import PagingOptions

    directory = ModelDirectory(args.model)
    from mlx_flash.performance.inspection import describe, report

    info = describe(directory, PagingOptions(context=args.context))
    print(json.dumps(info, indent=2) if args.json else report(info))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Hash everything again; exit code 1 and a line for each layer or file that is damaged."""
    from mlx_flash.model_directory import expert_demand_file
    from mlx_flash.model_directory.directory import ModelDirectory
    from mlx_flash.predictors import predictor_file

    directory = ModelDirectory(args.model)
    with ByteBar("verify", directory.verify_bytes) as bar:
        problems = list(directory.verify(bar))
    for module in (predictor_file, expert_demand_file):
        if (file := directory.path / module.NAME).exists():
            try:
                module.verify(file)
            except DamagedError as error:
                problems.append(error)
    for problem in problems:
        print(f"mlx_flash: {problem}", file=sys.stderr)
    if problems:
        return DamagedError.exit_code
    layers, files = len(directory.rows.layers), len(directory.files)
    print(f"{directory.path}: {layers} layers and {files} files as they were written")
    return 0

"""``mlx_flash inspect`` and ``mlx_flash verify``."""

from __future__ import annotations

import argparse
import json
import sys

from mlx_flash.errors import DamagedError, UsageError


def run_inspect(args: argparse.Namespace) -> int:
    """``mlx_flash inspect``."""
    from mlx_flash.model_directory.directory import ModelDirectory

    if args.context is not None and args.context < 1:
        raise UsageError(f"--context is at least 1, got {args.context}")
    directory = ModelDirectory(args.model)
    from mlx_flash.performance.inspection import describe, report
    from mlx_flash.runtime.options import PagingOptions

    info = describe(directory, PagingOptions(context=args.context))
    print(json.dumps(info, indent=2) if args.json else report(info))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """``mlx_flash verify``: exit code 1 and a line for each layer or file that is damaged."""
    from tqdm import tqdm

    from mlx_flash.model_directory import expert_demand_file
    from mlx_flash.model_directory.directory import ModelDirectory
    from mlx_flash.predictors import predictor_file

    directory = ModelDirectory(args.model)
    with tqdm(
        total=directory.verify_bytes, unit="B", unit_scale=True, desc="verify", disable=None
    ) as bar:
        problems = list(directory.verify(bar.update))
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

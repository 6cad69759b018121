"""The command line: convert, generate, inspect, verify; more commands in ``cli_*``.

Knows: flags, what is printed, exit codes (0 well, 1 damage or a failing disk, 2 a request that
cannot be carried out, 130 interrupted). Does not know: how any of it is done. Heavy imports wait
until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlx_flash import __version__
from mlx_flash.errors import FlashError, FlashWarning

from . import bench, calibrate, generate, plan, reorder
from .convert import MODES, run_convert
from .inspect import run_inspect, run_verify


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of ``mlx_flash``."""
    parser = argparse.ArgumentParser(
        prog="mlx_flash", description="Run language models larger than memory, FFN rows on flash."
    )
    parser.add_argument("--version", action="version", version=f"mlx_flash {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="make a model directory from a checkpoint")
    convert.add_argument(
        "--model", "--hf-path", required=True, help="Hugging Face directory, hub name or GGUF file"
    )
    convert.add_argument("--mlx-path", required=True, help="model directory to make")
    convert.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="float type to write (default: the checkpoint's)",
    )
    convert.add_argument(
        "--quantize", "-q", action="store_true", help="quantise as mlx_lm.convert does"
    )
    convert.add_argument("--q-bits", type=int, help="bits per weight (default: 4)")
    convert.add_argument("--q-group-size", type=int, help="weights per scale (default: 64)")
    convert.add_argument("--q-mode", default="affine", choices=MODES, help="default: affine")
    convert.add_argument(
        "--quant-predicate", metavar="RECIPE", help="mlx-lm's mixed recipes, such as mixed_4_6"
    )
    convert.add_argument(
        "--dequantize",
        "-d",
        action="store_true",
        help="make floats of a quantised checkpoint or GGUF (default: kept as they are)",
    )
    convert.add_argument(
        "--adapter",
        metavar="NAME",
        help="change the model by an adapter: relu-smollm2, which ships with this package, or a "
        "file (a GGUF is dequantised for it)",
    )
    convert.add_argument("--force", action="store_true", help="replace an existing model directory")
    convert.set_defaults(run=run_convert)

    generate.add(commands)
    inspect = commands.add_parser("inspect", help="say what is in a model directory")
    inspect.add_argument("--model", required=True, help="model directory")
    inspect.add_argument("--context", type=int, help="tokens to plan the KV cache for")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=run_inspect)

    verify = commands.add_parser("verify", help="hash a model directory again")
    verify.add_argument("--model", required=True, help="model directory")
    verify.set_defaults(run=run_verify)
    calibrate.add(commands)
    plan.add(commands)
    bench.add(commands)
    reorder.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no error
    try:
        with _warnings():
            code = args.run(args)
        print(end="", flush=True)
        return code
    except FlashError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        exec("")  # CPython forgets that it wanted to die by the signal, where it struck an exec
        return _fail(getattr(args, "interrupted", "interrupted"), 130)
    except BrokenPipeError:
        return _quiet(1)
    except OSError as error:
        return _fail(f"{error.filename or args.command}: {error.strerror or error}", 2)


@contextmanager
def _warnings() -> Iterator[None]:
    """Show the package's own warnings as lines of the command's."""

    def show(message: Warning | str, *args: Any) -> None:
        if isinstance(message, FlashWarning):
            print(f"mlx_flash: {message}", file=sys.stderr, flush=True)
        else:
            shown(message, *args)

    with warnings.catch_warnings():
        warnings.simplefilter("always", FlashWarning)
        shown, warnings.showwarning = warnings.showwarning, show
        yield


def _fail(message: str, code: int) -> int:
    """Say what is wrong behind all that was printed before."""
    try:
        print(end="", flush=True)
        print(f"mlx_flash: {message}", file=sys.stderr, flush=True)
    except OSError:
        return _quiet(code)
    return code


def _quiet(code: int) -> int:
    """Nobody reads any more: let the interpreter's last flush go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    return code

"""The command line: which commands there are, exit codes, what is said of errors.

Exit codes: 0 well, 1 damage or a failing disk, 2 a request that cannot be carried out, 130
interrupted.

A command's module is imported when it is asked for, and heavy imports wait until its arguments are
known to be good.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from mlx_flash import __version__
from mlx_flash.common.files import written
from mlx_flash.errors import FlashError, FlashWarning


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        help: what it does.
        needs: what has to be given.
        example: flags with which it runs.
        flags: function of this package that adds its flags to a parser.
    """

    help: str
    needs: str
    example: str
    flags: str


COMMANDS = {
    "convert": Command(
        "make a model directory from a checkpoint",
        "a checkpoint and the directory to make",
        "--model HuggingFaceTB/SmolLM2-135M-Instruct --mlx-path smollm2",
        "convert:add_flags",
    ),
    "generate": Command(
        "generate text from a model directory",
        "a model directory, as convert makes it, and a prompt",
        "--model smollm2 --prompt 'Why is the sky blue?'",
        "generate:add_flags",
    ),
    "inspect": Command(
        "say what is in a model directory",
        "a model directory, as convert makes it",
        "--model smollm2",
        "inspect:add_flags",
    ),
    "verify": Command(
        "hash a model directory again",
        "a model directory, as convert makes it",
        "--model smollm2",
        "inspect:add_verify_flags",
    ),
    "calibrate": Command(
        "fit predictors to a model directory, so that few rows are read; of a mixture, measure how "
        "to share its memory out over layers",
        "a model directory, as convert makes it",
        "--model smollm2",
        "calibrate:add_flags",
    ),
    "plan": Command(
        "say what a RAM budget buys, and how fast that is",
        "a model directory, as convert makes it, and a RAM budget",
        "--model smollm2 --ram 400MB",
        "plan:add_flags",
    ),
    "bench": Command(
        "measure speed under several RAM budgets",
        "a model directory, as convert makes it, and RAM budgets",
        "--model smollm2 --ram sweep",
        "bench:add_flags",
    ),
    "reorder": Command(
        "lay rows that are asked for together near each other, so that fewer requests read them; "
        "the model stays the same but for rounding",
        "a model directory, as convert makes it",
        "--model smollm2 --dry-run",
        "reorder:add_flags",
    ),
}


def build_parser(commands: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The argument parser of ``mlx_flash``.

    Args:
        commands: that get their flags; the others are only listed.
    """
    parser = argparse.ArgumentParser(
        prog="mlx_flash", description="Run language models larger than memory, FFN rows on flash."
    )
    parser.add_argument("--version", action="version", version=f"mlx_flash {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = subparsers.add_parser(name, help=command.help)
        if name in commands:
            resolve_name(f"{__package__}.{command.flags}")(added)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no error
    if hint := what_next(argv):
        return _fail(hint, FlashError.exit_code)
    args = argparse.Namespace(command="mlx_flash")
    try:
        args = build_parser([argument for argument in argv if argument in COMMANDS]).parse_args(
            argv
        )
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
        return _fail(f"{written(error) or args.command}: {error.strerror or error}", 2)
    except MemoryError:
        return _fail(f"{args.command}: out of memory; close other programs, or give --ram", 2)


def what_next(argv: Sequence[str]) -> str:
    """Two lines for somebody who gave no command, or a command and nothing else; else empty."""
    if not argv:
        begin = f"mlx_flash convert {COMMANDS['convert'].example}"
        return (
            f"give a command: {', '.join(COMMANDS)}\n"
            f"Begin with: {begin}; mlx_flash --help says what each does"
        )
    if len(argv) > 1 or argv[0] not in COMMANDS:
        return ""
    name, command = argv[0], COMMANDS[argv[0]]
    return (
        f"{name} needs {command.needs}\n"
        f"For example: mlx_flash {name} {command.example}; mlx_flash {name} --help lists its flags"
    )


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

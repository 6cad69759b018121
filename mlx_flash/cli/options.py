"""Flags that several commands share, and types that check a flag's text when it is parsed.

A type raises UsageError itself, which the command line prints as it does any other; argparse would
print the usage before it.

Knows: argparse. Does not know: what flags are for. Imports no MLX.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import BudgetError, CacheError, UsageError
from mlx_flash.paging.policies import DEFAULT_POLICY, DEFAULT_WINDOW, POLICIES, make_policy
from mlx_flash.predictors import registry
from mlx_flash.runtime.kv_policy import DEFAULT_KV, KV_POLICIES, check_kv
from mlx_flash.runtime.options import PagingOptions, policy_spec

GOES_ON = "interrupted; run the same command again and it goes on where it stopped"


def number(
    convert: Callable[[str], Any], allowed: Callable[[Any], bool], complaint: str
) -> Callable[[str], Any]:
    """A type for numbers.

    Args:
        convert: int or float.
        allowed: number -> whether it may be.
        complaint: what is said of one that may not be, before what was given.
    """

    def parse(text: str) -> Any:
        value = convert(text)
        if not allowed(value):
            raise UsageError(f"{complaint}, got {value}")
        return value

    parse.__name__ = convert.__name__  # what argparse says of text that is no number
    return parse


def at_least(flag: str, least: int, unit: str = "") -> Callable[[str], int]:
    """A type for whole numbers from ``least`` on."""
    complaint = f"{flag} is at least {least} {unit}".rstrip()
    return number(int, lambda value: value >= least, complaint)


def size(text: str) -> int:
    """A type for a RAM budget: bytes."""
    try:
        return parse_ram(text)
    except BudgetError as error:
        raise UsageError(str(error)) from error


def writable(flag: str) -> Callable[[str], Path]:
    """A type for a file to write: better refused now than after the work."""

    def parse(text: str) -> Path:
        file = Path(text)
        if not file.parent.is_dir():
            raise UsageError(f"{flag} {file}: {file.parent} is no directory")
        if file.is_dir():
            raise UsageError(f"{flag} {file} is a directory; give a file")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UsageError(f"{flag} {file} cannot be written: no permission")
        return file

    return parse


def kv_policy(text: str) -> str:
    """A type for a KV policy's spec."""
    try:
        check_kv(text)
    except CacheError as error:
        raise UsageError(f"--kv: {error}") from error
    return text


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--model DIR``."""
    parser.add_argument("--model", required=True, help="model directory")


def add_ram(
    parser: argparse.ArgumentParser, example: str = "1.5GB or 512MiB", required: bool = False
) -> None:
    """``--ram``, in bytes once parsed."""
    what = f"what the whole process may take, such as {example}"
    parser.add_argument("--ram", type=size, required=required, help=what)


def add_context(parser: argparse.ArgumentParser, default: str = "") -> None:
    """``--context``."""
    what = "tokens to plan the KV cache for" + (f"; default: {default}" if default else "")
    parser.add_argument("--context", type=at_least("--context", 1), help=what)


def add_paging(parser: argparse.ArgumentParser) -> None:
    """Flags that say how rows are chosen and kept, and keys and values."""
    parser.add_argument(
        "--predictor",
        default="auto",
        choices=registry.names(),
        help="how the rows that fire are known; default: what was calibrated, else what is exact",
    )
    parser.add_argument(
        "--policy",
        default=DEFAULT_POLICY,
        choices=POLICIES,
        help=f"which rows leave the cache; default: {DEFAULT_POLICY}",
    )
    parser.add_argument(
        "--window",
        type=at_least("--window", 1, "token"),
        metavar="K",
        help=f"tokens that --policy window keeps rows for; default: {DEFAULT_WINDOW}",
    )
    parser.add_argument(
        "--kv",
        type=kv_policy,
        default=DEFAULT_KV,
        metavar="SPEC",
        help=f"how keys and values are kept: {', '.join(KV_POLICIES)}, such as rotating:4096 "
        f"(tokens) or quantized:8 (bits); default: {DEFAULT_KV}",
    )


def paging_options(args: argparse.Namespace, **more: Any) -> PagingOptions:
    """What the flags of ``add_paging`` stand for.

    Args:
        more: fields of the options that come from other flags.

    Raises:
        UsageError: flags that contradict each other.
    """
    if args.window is not None and args.policy != "window":
        raise UsageError("--window needs --policy window")
    policy = policy_spec(args.policy, args.window)
    if more.get("lookahead") and make_policy(policy, 1).is_window:
        raise UsageError("--lookahead needs room that --policy window does not give; leave one out")
    return PagingOptions(predictor=args.predictor, policy=policy, kv=args.kv, **more)


def check_positions(positions: int | None, tokens: int, what: str, more: str = "") -> None:
    """Raise UsageError for more tokens than the model was made for.

    Args:
        positions: that it was made for; None where it does not say.
        what: where the tokens come from.
        more: what else is to be said.
    """
    if positions and tokens > positions:
        raise UsageError(
            f"{what} are more than the {positions} positions that the model was made for{more}"
        )

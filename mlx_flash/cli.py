"""The command line: convert, generate, inspect, verify.

Knows: flags, what is printed, exit codes (0 well, 1 damage or a failing disk, 2 a request that
cannot be carried out, 130 interrupted). Does not know: how any of it is done. Heavy imports wait
until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .budget import parse_ram, show
from .errors import DamagedError, FlashError, ModelError


class UsageError(FlashError):
    """Arguments that contradict themselves."""


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
        help="float type to write (default: the checkpoint's; bfloat16 for a quantised GGUF)",
    )
    convert.add_argument("--force", action="store_true", help="replace an existing model directory")
    convert.set_defaults(run=run_convert)

    generate = commands.add_parser("generate", help="generate text from a model directory")
    generate.add_argument("--model", required=True, help="model directory")
    generate.add_argument("--prompt", "-p", required=True, help="message; '-' reads from stdin")
    generate.add_argument("--system-prompt", help="system message for the chat template")
    generate.add_argument("--max-tokens", "-m", type=int, default=100, help="default: 100")
    generate.add_argument("--temp", type=float, default=0.0, help="sampling temperature")
    generate.add_argument("--top-p", type=float, default=1.0, help="sampling top-p")
    generate.add_argument("--top-k", type=int, default=0, help="sampling top-k")
    generate.add_argument("--seed", type=int, help="PRNG seed")
    generate.add_argument("--ram", help="what the whole process may take, such as 1.5GB or 512MiB")
    generate.add_argument("--dense", action="store_true", help="every weight in memory, no paging")
    generate.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="use the raw prompt without the tokenizer's chat template",
    )
    generate.add_argument("--stats", type=Path, metavar="FILE", help="write figures as JSON")
    generate.set_defaults(run=run_generate)

    inspect = commands.add_parser("inspect", help="say what is in a model directory")
    inspect.add_argument("--model", required=True, help="model directory")
    inspect.add_argument("--context", type=int, help="tokens to plan the KV cache for")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=run_inspect)

    verify = commands.add_parser("verify", help="hash a model directory again")
    verify.add_argument("--model", required=True, help="model directory")
    verify.set_defaults(run=run_verify)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no error
    try:
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


def run_convert(args: argparse.Namespace) -> int:
    """``mlx_flash convert``."""
    args.interrupted = "interrupted; run the same command again and it goes on where it stopped"
    from tqdm import tqdm

    from .converter import convert

    with tqdm(unit="B", unit_scale=True, desc="convert", disable=None) as bar:

        def progress(nbytes: int, what: str) -> None:
            if what == "total":
                bar.reset(total=nbytes)
            else:
                bar.set_postfix_str(what, refresh=False)
                bar.update(nbytes)

        out = convert(
            args.model, args.mlx_path, dtype=args.dtype, force=args.force, progress=progress
        )
    print(f"Saved {out}")
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """``mlx_flash generate``."""
    _check_generate(args)
    from .directory import ModelDirectory

    directory = ModelDirectory(args.model)
    from .loader import load_model, load_tokenizer

    tokenizer = load_tokenizer(directory)
    prompt = _prompt_tokens(args, tokenizer)
    if not prompt:
        raise UsageError("the prompt has no tokens for this model's tokenizer; give another one")
    context = len(prompt) + args.max_tokens
    limit = directory.config.get("max_position_embeddings")
    if limit and context > limit:
        raise UsageError(
            f"{len(prompt)} prompt tokens and --max-tokens {args.max_tokens} are more than the "
            f"{limit} positions that the model was made for"
        )
    model = load_model(directory, args.ram, not args.dense, context=context)
    result = _stream(args, model, tokenizer, prompt)
    _summary(result)
    if args.stats:
        _write_stats(args.stats, result)
    return 0


def _check_generate(args: argparse.Namespace) -> None:
    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens is at least 1, got {args.max_tokens}")
    if not 0 <= args.temp < math.inf:
        raise UsageError(f"--temp is a number from 0 on, got {args.temp}")
    if not 0 <= args.top_p <= 1:
        raise UsageError(f"--top-p is from 0 to 1, got {args.top_p}")
    if args.top_k < 0:
        raise UsageError(f"--top-k is not negative, got {args.top_k}")
    if args.seed is not None and not 0 <= args.seed < 2**64:
        raise UsageError(f"--seed is from 0 to 2^64 - 1, got {args.seed}")
    if args.ram is not None:
        parse_ram(args.ram)
    args.prompt = _text(args.prompt)
    if not args.prompt.strip():
        raise UsageError("the prompt is empty; give --prompt TEXT, or '-' and text on stdin")
    if args.stats:
        _check_stats(args.stats)


def _text(prompt: str) -> str:
    """The prompt, from stdin where it is '-'; UsageError unless it is text."""
    try:
        if prompt == "-":
            prompt = sys.stdin.read() if sys.stdin else ""
        prompt.encode()  # fails on bytes that were taken in though they are no text
    except UnicodeError as error:
        raise UsageError(f"the prompt is not text in UTF-8: {error}") from error
    return prompt


def _check_stats(file: Path) -> None:
    """Raise UsageError where figures could not be written: better now than after the work."""
    if not file.parent.is_dir():
        raise UsageError(f"--stats {file}: {file.parent} is no directory")
    if file.is_dir():
        raise UsageError(f"--stats {file} is a directory; give a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"--stats {file} cannot be written: no permission")


def _write_stats(file: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=2) + "\n"
    if file.exists() and not file.is_file():  # a pipe or a device: not to be replaced
        file.write_text(text)
        return
    file = file.resolve()
    temporary = file.with_name(file.name + ".writing")
    try:
        temporary.write_text(text)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _prompt_tokens(args: argparse.Namespace, tokenizer: Any) -> list[int]:
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        if args.system_prompt is not None:
            raise UsageError("--system-prompt needs a chat template")
        return tokenizer.encode(args.prompt)
    messages = [{"role": "user", "content": args.prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's authors
        raise UsageError(
            f"the model's chat template refuses the messages ({error}); "
            "try without --system-prompt, or with --ignore-chat-template"
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)


def _stream(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompt: list[int]
) -> dict[str, Any]:
    """Generate, print as it comes, and return the figures."""
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from . import footprint

    if args.seed is not None:
        mx.random.seed(args.seed)
    vocabulary = getattr(getattr(model, "args", None), "vocab_size", math.inf)
    top_k = args.top_k if args.top_k < vocabulary else 0
    sampler = make_sampler(args.temp, top_p=args.top_p, top_k=top_k)
    flash = getattr(model, "flash", None)
    tokens: list[int] = []
    text = ""
    began = time.perf_counter()
    first, before = began, flash.stats() if flash else None
    print("=" * 10)
    response = None
    try:
        for response in stream_generate(
            model, tokenizer, prompt, max_tokens=args.max_tokens, sampler=sampler
        ):
            if not tokens:
                first, before = time.perf_counter(), flash.stats() if flash else None
            tokens.append(response.token)
            text += response.text
            print(response.text, end="", flush=True)
    except (FlashError, KeyboardInterrupt):
        print()
        raise
    ended = time.perf_counter()
    print("\n" + "=" * 10)
    if response is None:
        raise ModelError("the model generated nothing")
    result: dict[str, Any] = {
        "tokens": tokens,
        "text": text,
        "finish_reason": response.finish_reason,
        "prompt_tokens": len(prompt),
        "prompt_seconds": first - began,
        "generation_tokens": len(tokens),
        "generation_seconds": ended - first,
        "peak_footprint_bytes": footprint.peak(),
        "budget_bytes": parse_ram(args.ram) if args.ram is not None else None,
        "flash": None,
    }
    if flash and before:
        result["flash"] = _flash_figures(flash, before, ended - first)
    return result


def _flash_figures(flash: Any, before: Any, seconds: float) -> dict[str, Any]:
    spent = flash.stats() - before
    steps = max(spent.forwards, 1)
    return {
        "bytes_read": spent.bytes_read,
        "requests": spent.requests,
        "read_seconds": spent.read_seconds,
        "wait_seconds": spent.wait_seconds,
        "compute_seconds": max(seconds - spent.wait_seconds, 0.0),
        "hits": spent.hits,
        "misses": spent.misses,
        "forwards": spent.forwards,
        "bytes_per_token": spent.bytes_read / steps,
        "direct": spent.direct,
        "kept_layers": len(flash.plan.kept),
        "streamed_layers": len(flash.plan.streamed),
        "planned_bytes": flash.plan.table,
    }


def _summary(result: dict[str, Any]) -> None:
    """The closing lines, mlx-lm's own and what was read."""
    seconds = max(result["generation_seconds"], 1e-9)
    prompt_tps = result["prompt_tokens"] / max(result["prompt_seconds"], 1e-9)
    print(f"Prompt: {result['prompt_tokens']} tokens, {prompt_tps:.3f} tokens-per-sec")
    tps = result["generation_tokens"] / seconds
    print(f"Generation: {result['generation_tokens']} tokens, {tps:.3f} tokens-per-sec")
    budget = result["budget_bytes"]
    limit = f" of {show(budget)}" if budget else ""
    print(f"Peak memory: {result['peak_footprint_bytes'] / 1e9:.3f} GB{limit}, whole process")
    flash = result["flash"]
    if not flash or not flash["forwards"]:  # a single token is the prompt's doing
        return
    rows = flash["hits"] + flash["misses"]
    layers = flash["kept_layers"] + flash["streamed_layers"]
    how = "" if flash["direct"] else " through the page cache (no direct I/O here)"
    print(
        f"Flash: {show(flash['bytes_per_token'])} read per token{how}, "
        f"hit rate {100 * flash['hits'] / max(rows, 1):.1f} %, "
        f"rows of {flash['kept_layers']} of {layers} layers kept"
    )
    print(
        f"Time: reading {100 * flash['read_seconds'] / seconds:.0f} %, "
        f"computing {100 * flash['compute_seconds'] / seconds:.0f} %, "
        f"waiting {100 * flash['wait_seconds'] / seconds:.0f} % (reading runs beside computing)"
    )


def run_inspect(args: argparse.Namespace) -> int:
    """``mlx_flash inspect``."""
    from .directory import ModelDirectory

    if args.context is not None and args.context < 1:
        raise UsageError(f"--context is at least 1, got {args.context}")
    directory = ModelDirectory(args.model)
    from .inspection import describe, report

    info = describe(directory, args.context)
    print(json.dumps(info, indent=2) if args.json else report(info))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """``mlx_flash verify``: exit code 1 and a line for each layer or file that is damaged."""
    from tqdm import tqdm

    from .directory import ModelDirectory

    directory = ModelDirectory(args.model)
    with tqdm(
        total=directory.verify_bytes, unit="B", unit_scale=True, desc="verify", disable=None
    ) as bar:
        problems = list(directory.verify(bar.update))
    for problem in problems:
        print(f"mlx_flash: {problem}", file=sys.stderr)
    if problems:
        return DamagedError.exit_code
    layers, files = len(directory.rows.layers), len(directory.files)
    print(f"{directory.path}: {layers} layers and {files} files as they were written")
    return 0

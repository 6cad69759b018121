"""``mlx_flash generate``: text from a model directory, and what was read for it.

Knows: its flags, what is printed, the figures of a run. Does not know: how any of it is done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from mlx_flash.common.sizes import parse_ram, show
from mlx_flash.errors import FlashError, ModelError, UsageError
from mlx_flash.paging.policies import DEFAULT_POLICY, DEFAULT_WINDOW, POLICIES
from mlx_flash.predictors import registry

UNITS = {"neuron": "rows", "expert": "experts", "layer": "FFNs"}


def add(commands: Any) -> None:
    """Add the subcommand to the parser's."""
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
        "--predictor",
        default="auto",
        choices=registry.names(),
        help="how the rows that fire are known; default: what was calibrated, else what is exact",
    )
    generate.add_argument(
        "--policy", choices=POLICIES, help=f"which rows leave the cache; default: {DEFAULT_POLICY}"
    )
    generate.add_argument(
        "--window",
        type=int,
        metavar="K",
        help=f"tokens that --policy window keeps rows for; default: {DEFAULT_WINDOW}",
    )
    generate.add_argument(
        "--lookahead",
        action=argparse.BooleanOptionalAction,
        help="read ahead what the next layer's low-rank predictor names (default: yes), or, of "
        "mixtures, what its router would choose (default: no)",
    )
    generate.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="use the raw prompt without the tokenizer's chat template",
    )
    generate.add_argument("--stats", type=Path, metavar="FILE", help="write figures as JSON")
    generate.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """``mlx_flash generate``."""
    _check_generate(args)
    from mlx_flash.model_directory.directory import ModelDirectory

    directory = ModelDirectory(args.model)
    from mlx_flash.runtime.load import load_model, load_tokenizer
    from mlx_flash.runtime.options import PagingOptions, policy_spec
    from mlx_flash.runtime.pagers.back_end import slow_back_end

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
    options = PagingOptions(
        ram=None if args.ram is None else parse_ram(args.ram),
        context=context,
        use_flash=not args.dense,
        predictor=args.predictor,
        policy=policy_spec(args.policy or DEFAULT_POLICY, args.window),
        lookahead=args.lookahead,
    )
    model = load_model(directory, options)
    if note := slow_back_end(directory):
        print(f"mlx_flash: note: {note}", file=sys.stderr)
    result = _stream(args, model, tokenizer, prompt)
    _summary(result)
    if args.stats:
        from mlx_flash.common.files import replace_text

        replace_text(args.stats, json.dumps(result, indent=2) + "\n")
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
    if args.dense and args.predictor not in ("auto", "none"):
        raise UsageError(f"--dense reads nothing, so --predictor {args.predictor} has no use")
    if args.lookahead and args.policy == "window":
        raise UsageError("--lookahead needs room that --policy window does not give; leave one out")
    if args.dense and args.lookahead:
        raise UsageError("--dense reads nothing, so --lookahead has no use")
    if args.window is not None:
        if args.window < 1:
            raise UsageError(f"--window is at least 1 token, got {args.window}")
        if (args.policy or DEFAULT_POLICY) != "window":
            raise UsageError("--window needs --policy window")
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

    from mlx_flash.common.platform import current_platform

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
        "peak_footprint_bytes": current_platform().peak_process_bytes(),
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
        "predictor": flash.selection.kind if flash.selection else "none",
        "exact": flash.selection.exact if flash.selection else True,
        "measured": flash.selection.measured if flash.selection else {},
        "predicted": spent.predicted,
        "layer_calls": spent.layer_calls,
        "predict_seconds": spent.predict_seconds,
        "manage_seconds": spent.manage_seconds,
        "unit": flash.directory.unit,
        "lookahead": flash.lookahead and bool(flash.caches),
        "foretold": spent.foretold,
        "useful": spent.useful,
        "cached_rows": sum(flash.plan.slots.values()),
        "bytes_per_token": spent.bytes_read / steps,
        "direct": spent.direct,
        "kept_layers": len(flash.plan.kept),
        "streamed_layers": len(flash.plan.streamed),
        "rows": [layer.rows for layer in flash.directory.rows.layers],
        "planned_bytes": flash.plan.to_json(),
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
    layers = len(flash["rows"])
    how = "" if flash["direct"] else " through the page cache (no direct I/O here)"
    print(
        f"Flash: {show(flash['bytes_per_token'])} read per token{how}, "
        f"hit rate {100 * flash['hits'] / max(rows, 1):.1f} %, "
        f"{UNITS[flash['unit']]} of {flash['kept_layers']} of {layers} layers kept"
    )
    if flash["unit"] == "expert" and flash["cached_rows"]:
        print(_experts_line(flash))
    elif flash["cached_rows"]:
        print(_predictor_line(flash))
    print(
        f"Time: reading {100 * flash['read_seconds'] / seconds:.0f} %, "
        f"computing {100 * flash['compute_seconds'] / seconds:.0f} %, "
        f"waiting {100 * flash['wait_seconds'] / seconds:.0f} % (reading runs beside computing)"
    )


def _experts_line(flash: dict[str, Any]) -> str:
    """How many experts a layer was asked for, and what was prefetched."""
    asked = flash["predicted"] / max(flash["layer_calls"], 1)
    most = flash["rows"][0]
    line = (
        f"Experts: {asked:.1f} of {most} asked for per layer and step, "
        f"{100 * flash['cached_rows'] / sum(flash['rows']):.1f} % in slots; exact"
    )
    return line + _ahead(flash)


def _ahead(flash: dict[str, Any]) -> str:
    """What was prefetched; empty where nothing was."""
    if not flash["foretold"]:
        return ""
    share = 100 * flash["useful"] / flash["foretold"]
    return f"; {flash['foretold']} read ahead, {share:.0f} % of them needed"


def _predictor_line(flash: dict[str, Any]) -> str:
    """Which rows were taken to fire, and what that costs in quality."""
    calls = sum(flash["rows"]) / len(flash["rows"]) * max(flash["layer_calls"], 1)
    line = (
        f"Predictor: {flash['predictor']}, {100 * flash['predicted'] / calls:.1f} % of the rows "
        f"asked for, {100 * flash['cached_rows'] / sum(flash['rows']):.1f} % cached"
        f"{_ahead(flash)}; "
    )
    if flash["exact"]:
        return line + "exact"
    measured = flash["measured"]
    if not {"perplexity_dense", "perplexity_predicted"} <= measured.keys():
        return line + "lossy, the loss was not measured"
    dense, predicted = measured["perplexity_dense"], measured["perplexity_predicted"]
    return line + (
        f"lossy, perplexity {predicted:.2f} against {dense:.2f} "
        f"({100 * (predicted / dense - 1):+.1f} %) when calibrated"
    )

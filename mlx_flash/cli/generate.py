"""``mlx_flash generate``: text from a model directory.

Knows: its flags, how a run goes. Does not know: what is shown of it (``generate_report``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

from mlx_flash.errors import BudgetError, FlashError, ModelError, UsageError

from . import options
from .generate_report import Run, summary


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    options.add_model(parser)
    parser.add_argument("--prompt", "-p", required=True, help="message; '-' reads from stdin")
    parser.add_argument("--system-prompt", help="system message for the chat template")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=options.at_least("--max-tokens", 1),
        default=100,
        help="default: 100",
    )
    _add_sampling(parser)
    options.add_ram(parser)
    parser.add_argument("--dense", action="store_true", help="every weight in memory, no paging")
    options.add_paging(parser)
    parser.add_argument(
        "--lookahead",
        action=argparse.BooleanOptionalAction,
        help="read ahead what the next layer's low-rank predictor names (default: yes), or, of "
        "mixtures, what its router would choose (default: no)",
    )
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="use the raw prompt without the tokenizer's chat template",
    )
    parser.add_argument(
        "--stats",
        type=options.writable("--stats"),
        metavar="FILE",
        help="write figures as JSON",
    )
    parser.set_defaults(run=run)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temp",
        type=options.number(
            float, lambda value: 0 <= value < math.inf, "--temp is a number from 0 on"
        ),
        default=0.0,
        help="sampling temperature",
    )
    parser.add_argument(
        "--top-p",
        type=options.number(float, lambda value: 0 <= value <= 1, "--top-p is from 0 to 1"),
        default=1.0,
        help="sampling top-p",
    )
    parser.add_argument(
        "--top-k",
        type=options.number(int, lambda value: value >= 0, "--top-k is not negative"),
        default=0,
        help="sampling top-k",
    )
    parser.add_argument(
        "--seed",
        type=options.number(int, lambda value: 0 <= value < 2**64, "--seed is from 0 to 2^64 - 1"),
        help="PRNG seed",
    )


def run(args: argparse.Namespace) -> int:
    """Generate, print text and figures; returns the exit code."""
    if args.dense and args.predictor not in ("auto", "none"):
        raise UsageError(f"--dense reads nothing, so --predictor {args.predictor} has no use")
    if args.dense and args.lookahead:
        raise UsageError("--dense reads nothing, so --lookahead has no use")
    how = options.paging_options(
        args, ram=args.ram, use_flash=not args.dense, lookahead=args.lookahead
    )
    args.prompt = _text(args.prompt)
    if not args.prompt.strip():
        raise UsageError("the prompt is empty; give --prompt TEXT, or '-' and text on stdin")
    from mlx_flash.model_directory.directory import ModelDirectory

    directory = ModelDirectory(args.model)
    from mlx_flash.runtime.load import load_model, load_tokenizer
    from mlx_flash.runtime.pagers.back_end import slow_back_end

    tokenizer = load_tokenizer(directory)
    prompt = _prompt_tokens(args, tokenizer)
    if not prompt:
        raise UsageError("the prompt has no tokens for this model's tokenizer; give another one")
    context = len(prompt) + args.max_tokens
    what = f"{len(prompt)} prompt tokens and --max-tokens {args.max_tokens}"
    options.check_positions(directory.positions, context, what)
    model = load_model(directory, how.replace(context=context))
    if note := slow_back_end(directory):
        print(f"mlx_flash: note: {note}", file=sys.stderr)
    done = Run(len(prompt), args.ram)
    try:
        _stream(args, model, tokenizer, prompt, done)
    except BudgetError:
        _write_stats(args, done.figures())
        raise
    result = done.figures()
    for line in summary(result):
        print(line)
    _write_stats(args, result)
    return 0


def _write_stats(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.stats:
        from mlx_flash.common.files import replace_text

        replace_text(args.stats, json.dumps(result, indent=2) + "\n")


def _text(prompt: str) -> str:
    """The prompt, from stdin where it is '-'; UsageError unless it is text."""
    try:
        if prompt == "-":
            prompt = sys.stdin.read() if sys.stdin else ""
        prompt.encode()  # fails on bytes that were taken in though they are no text
    except UnicodeError as error:
        raise UsageError(f"the prompt is not text in UTF-8: {error}") from error
    return prompt


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


def _check_finite(response: Any) -> None:
    """Raise ModelError where a token was chosen from logits that are no numbers.

    One NaN or infinity among them makes all logarithms of probabilities NaN, or this token's.
    """
    if not math.isfinite(response.logprobs[response.token].item()):
        raise ModelError(
            "the model's logits are NaN or infinite: its weights are damaged or its float type is "
            "too narrow; mlx_flash verify tells about damage, else convert it with another --dtype"
        )


def _stream(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompt: list[int], done: Run
) -> None:
    """Generate, print the text as it comes, and note what was done in ``done``."""
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    if args.seed is not None:
        mx.random.seed(args.seed)
    vocabulary = getattr(getattr(model, "args", None), "vocab_size", math.inf)
    top_k = args.top_k if args.top_k < vocabulary else 0
    sampler = make_sampler(args.temp, top_p=args.top_p, top_k=top_k)
    done.begin(getattr(model, "flash", None), time.perf_counter())
    print("=" * 10)
    response = None
    try:
        for response in stream_generate(
            model, tokenizer, prompt, max_tokens=args.max_tokens, sampler=sampler
        ):
            _check_finite(response)
            done.token(response.token, response.text, time.perf_counter())
            print(response.text, end="", flush=True)
    except (FlashError, KeyboardInterrupt):
        done.end(None, time.perf_counter())
        print()
        raise
    except RuntimeError as error:  # MLX's own: no memory, or a kernel that cannot be compiled
        done.end(None, time.perf_counter())
        print()
        raise ModelError(f"MLX could not go on with {args.model}: {error!s:.500}") from error
    done.end(response and response.finish_reason, time.perf_counter())
    print("\n" + "=" * 10)
    if response is None:
        raise ModelError("the model generated nothing")

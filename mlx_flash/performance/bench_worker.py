"""One budget of ``mlx_flash bench``, in a process of its own.

Run as ``python -m mlx_flash.performance.bench_worker``. It takes settings as one JSON object on
stdin and writes one JSON object a line to stdout: the tokens done since the last line (``done``),
and at the end the figures (``figures``) or the reason why there are none (``error``).

Knows: one run. Does not know: other budgets, what is printed for people.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any, TextIO

from mlx_flash.errors import FlashError


def run(settings: dict[str, Any], say: TextIO) -> dict[str, Any]:
    """Load, warm up, time; figures of each repetition and of the process.

    Raises:
        FlashError: the budget does not work, or the model does not.
    """
    from mlx_flash.common.platform import current_platform
    from mlx_flash.model_directory.directory import ModelDirectory
    from mlx_flash.runtime.load import load_model, load_tokenizer
    from mlx_flash.runtime.options import PagingOptions

    from .teacher_forcing import book, walk

    directory = ModelDirectory(settings["model"])
    tokenizer = load_tokenizer(directory)
    prompt, generated, repeats = (settings[n] for n in ("prompt_tokens", "gen_tokens", "repeats"))
    length = prompt + generated
    tokens = book(tokenizer, length * (repeats + 1)).reshape(repeats + 1, length)
    model = load_model(directory, PagingOptions(**settings["options"]))
    # The loop begins one token more than it gives out, and that is not a user's token.
    model.flash.max_tokens = None

    def progress(count: int) -> None:
        print(json.dumps({"done": count}), file=say, flush=True)

    prefill, decode, steps = [], [], []
    for text in tokens:
        walked = walk(model, text[:prompt], text[prompt:], progress=progress)
        prefill.append(walked.prompt_tokens / walked.prompt_seconds)
        decode.append(len(walked.steps) / walked.seconds)
        steps.append({"seconds": walked.seconds, **asdict(walked.spent())})
    plan = model.flash.plan
    figures = {
        "prefill": prefill[1:],
        "decode": decode[1:],
        "tokens": generated,
        "repeats": steps[1:],
        "peak_footprint_bytes": current_platform().peak_process_bytes(),
        "direct": model.flash.reader.direct,
        "predictor": model.flash.selection.kind if model.flash.selection else "none",
        "kept_layers": len(plan.kept),
        "streamed_layers": len(plan.streamed),
        "cached_rows": sum(plan.slots.values()),
        "prompt_chunk_tokens": plan.step,
    }
    model.flash.close()
    return figures


def main() -> int:
    """See the module."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever prints must not mix with the lines
    try:
        found = {"figures": run(json.load(sys.stdin), out)}
    except (FlashError, MemoryError) as error:
        found = {"error": str(error) or "out of memory"}
    print(json.dumps(found), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

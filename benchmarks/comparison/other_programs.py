"""One program generates from one model, in a process and a virtual environment of its own.

    python other_programs.py '{"program": "llama.cpp", "path": ..., "prompt": [...], "tokens": 24,
                               "seconds": 90}'

Prints one JSON line: the tokens, when each came, and the bytes that the process had read from the
disk by then (``read_bytes`` of ``/proc/self/io``: direct reads, buffered ones that missed the page
cache, and faults of mapped files alike). Stops after ``tokens`` tokens, or ``seconds`` after the
first one.

Knows: how each program is called. Does not know: limits, how models are made (``against_others``).
Imports nothing of ours, so that it runs where only the other program is installed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Tokens = Iterator[int]


def bytes_read() -> int:
    """Bytes that this process had read from the disk so far."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def ours(job: dict[str, Any]) -> Tokens:
    """``ram`` and ``predictor`` as in ``mlx_flash.load``."""
    from mlx_lm import stream_generate

    from mlx_flash import load

    context = len(job["prompt"]) + job["tokens"]
    model, tokenizer = load(
        job["path"], job.get("ram"), predictor=job["predictor"], context=context
    )
    flash, first = model.flash, []
    job["stats"] = lambda: dataclasses.asdict(flash.stats() - first[0])
    for response in stream_generate(model, tokenizer, job["prompt"], max_tokens=job["tokens"]):
        first.append(flash.stats())
        yield response.token


def mlx_lm(job: dict[str, Any]) -> Tokens:
    """mlx-lm's own model, all of it in memory."""
    from mlx_lm import load, stream_generate

    model, tokenizer = load(job["path"])
    for response in stream_generate(model, tokenizer, job["prompt"], max_tokens=job["tokens"]):
        yield response.token


def llama_cpp(job: dict[str, Any]) -> Tokens:
    """llama.cpp over a mapped GGUF file, as many threads as cores, greedy."""
    from llama_cpp import Llama

    model = Llama(
        job["path"], n_ctx=512, n_threads=2, n_threads_batch=2, use_mmap=True, verbose=False
    )
    yield from model.generate(job["prompt"], temp=0.0, top_k=1, repeat_penalty=1.0)


def accelerate(job: dict[str, Any]) -> Tokens:
    """transformers, what exceeds ``ram`` offloaded to disk by accelerate."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    kwargs = {"dtype": torch.float16}
    if job.get("ram"):
        kwargs |= {
            "device_map": "auto",
            "max_memory": {"cpu": job["ram"]},
            "offload_folder": job["folder"],
        }
    model = AutoModelForCausalLM.from_pretrained(job["path"], **kwargs)
    ids, cache = torch.tensor([job["prompt"]]), None
    with torch.no_grad():
        for _ in range(job["tokens"]):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(dim=-1)
            yield int(ids)


def nunspark(job: dict[str, Any]) -> Tokens:
    """A packed directory, ``ram`` bytes of budget."""
    from nunspark.engine import StreamingEngine
    from nunspark.generate import stream_generate
    from nunspark.manifest import Manifest

    root = Path(job["path"])
    engine = StreamingEngine(root, Manifest.load(root / "manifest.json"), budget_bytes=job["ram"])
    yield from stream_generate(engine, job["prompt"], max_tokens=job["tokens"])


PROGRAMS = {
    "ours": ours,
    "mlx-lm": mlx_lm,
    "llama.cpp": llama_cpp,
    "accelerate": accelerate,
    "nunspark": nunspark,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    tokens, seconds, read = [], [], []
    for token in itertools.islice(PROGRAMS[job["program"]](job), job["tokens"]):
        tokens.append(token)
        seconds.append(time.perf_counter())
        read.append(bytes_read())
        if seconds[-1] - seconds[0] > job["seconds"]:
            break
    found = {"tokens": tokens, "seconds": seconds, "read": read}
    if "stats" in job:
        found["stats"] = job["stats"]()
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

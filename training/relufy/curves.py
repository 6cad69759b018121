"""The log of a training, and a picture of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from . import text
from .settings import saved


def history(path: Path) -> tuple[list[dict], list[dict], dict]:
    """Steps, evaluations, and the dense model's, of a training and those it begins from."""
    settings = saved(path)
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    before: tuple[list[dict], list[dict]] = ([], [])
    if settings.begin_from:
        steps, evals, _ = history(path.with_name(settings.begin_from))
        before = (steps, evals[:-1])  # the next training measures the same state again
    done = before[0][-1]["tokens"] if before[0] else 0
    for line in lines:
        line["tokens"] = done + line.get("step", 0) * settings.batch * text.WINDOW
    kinds = {kind: [x for x in lines if x["event"] == kind] for kind in ("step", "eval", "dense")}
    return before[0] + kinds["step"], before[1] + kinds["eval"], kinds["dense"][0]


def curves(path: Path, out: Path) -> None:
    """Loss, zeros and held-out perplexity over tokens, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, evals, dense = history(path)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    smooth = np.convolve([s["kl"] for s in steps], np.ones(25) / 25, "valid")
    axes[0].plot([s["tokens"] / 1000 for s in steps][24:], smooth)
    axes[0].set(
        title="KL on training text, mean of 25 steps", xlabel="thousand tokens", yscale="log"
    )
    smooth = np.convolve([s["zeros"] for s in steps], np.ones(25) / 25, "valid")
    axes[1].plot([s["tokens"] / 1000 for s in steps][24:], smooth)
    axes[1].set(title="zeros, mean over layers", xlabel="thousand tokens")
    for name in ("prose", "chat"):
        ratio = [e[name] / dense[name] for e in evals]
        axes[2].plot([e["tokens"] / 1000 for e in evals], ratio, "o-", label=f"held-out {name}")
    axes[2].set(title="perplexity over the dense model's", xlabel="thousand tokens", ylim=(1, 1.6))
    axes[2].legend()
    figure.savefig(out, dpi=110)

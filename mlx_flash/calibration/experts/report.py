"""The report of how a mixture uses its experts: JSON, a table and a picture."""

from __future__ import annotations

from typing import Any

from mlx_flash import __version__
from mlx_flash.calibration.report_files import PLOT, panels
from mlx_flash.calibration.text import CalibrationText
from mlx_flash.model_directory.directory import ModelDirectory

from .figures import DEMAND_TOKENS, WINDOWS

FORMAT_VERSION = 1
LABELS = {
    "equal": "equal shares",
    "distinct": f"by experts in {DEMAND_TOKENS} tokens",
    "measured": "by curves of misses",
}


def build(
    directory: ModelDirectory,
    settings: dict[str, Any],
    text: CalibrationText,
    layers: list[dict[str, Any]],
    splits: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
        layers: from ``layer_figures``.
        splits: from ``compare_splits``.
        seconds: stage -> time it took.
    """
    return {
        "format_version": FORMAT_VERSION,
        "mlx_flash": __version__,
        "model": directory.path.absolute().name,
        "rows_fingerprint": directory.rows.fingerprint,
        "row_bytes": directory.rows.layout.stride,
        "settings": settings,
        "text": text.describe(),
        "splits": splits,
        "used": "measured" if gain(splits) > 0 else "equal",
        "seconds": seconds,
        "layers": [{"layer": i} | layer for i, layer in enumerate(layers)],
    }


def gain(splits: dict[str, Any], name: str = "measured") -> float:
    """Share of the misses of equal shares that a split avoids, on average over the budgets."""
    pairs = list(zip(splits["misses"][name], splits["misses"]["equal"], strict=True))
    return sum(1 - own / equal if equal else 0.0 for own, equal in pairs) / len(pairs)


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """Figures for ``experts.json``, none of which differs from run to run."""
    return {
        "splits": report["splits"],
        "gain": gain(report["splits"]),
        "tokens": report["text"]["train_tokens"],
        "text": report["text"]["source"],
        "settings": report["settings"],
    }


def table(report: dict[str, Any]) -> str:
    """The report for people, as plain text."""
    settings, text, splits = report["settings"], report["text"], report["splits"]
    lines = [
        f"{report['model']}: what its experts are asked for, seed {settings['seed']}",
        f"Text: {text['source']}, sequences of {text['sequence']} tokens; {text['train_tokens']} "
        f"to measure on; to compare splits on, {text['held_out_tokens']}, behind "
        f"{text['validation_tokens']} that fill the slots",
        "",
        *_layer_table(report["layers"]),
        "",
        "top 25 %: share of the asks that go to the most used quarter of a layer's experts.",
        "foretold: share of the asks that the layer's router would have named a layer before.",
        "hits over Belady's: with slots for 1/8, 1/4 and 1/2 of a layer's experts.",
        "",
        "Misses per token, all layers, on text that no split has seen",
        f"  {'slots for':<26}" + "".join(f"{100 * s:>8.1f} %" for s in splits["shares"]),
    ]
    for name, label in LABELS.items():
        numbers = "".join(f"{n:>10.3f}" for n in splits["misses"][name])
        lines.append(f"  {label:<26}{numbers}   {100 * (0 - gain(splits, name)):+.1f} %")
    lines.append(
        "A RAM budget is shared out by the curves of misses."
        if report["used"] == "measured"
        else "The curves do no better than equal shares here: layers get equal shares."
    )
    if report["plot"] != PLOT:
        lines += ["", report["plot"]]
    return "\n".join(lines) + "\n"


def _layer_table(layers: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'':<42} {'LFU':^17}  {'LRU':^17}  {'window':^17}",
        f"{'layer':>5} {'experts':>7} {'asked':>6} {'top 25 %':>9} {'foretold':>9}   "
        + f"{'hits over Belady':<59}distinct experts in 1 to {max(WINDOWS)} tokens",
    ]
    for layer in layers:
        foretold = "-" if layer["foretold"] is None else f"{100 * layer['foretold']:.1f} %"
        hits = "  ".join(
            " ".join(f"{n:5.3f}" for n in layer["hits_over_belady"][name])
            for name in ("lfu", "lru", "window")
        )
        counts = " ".join(f"{n:5.1f}" for n in layer["distinct"].values())
        lines.append(
            f"{layer['layer']:>5} {layer['experts']:>7} {layer['asked_for']:>6} "
            f"{100 * layer['top_share']:>7.1f} % {foretold:>9}   {hits}    {counts}"
        )
    return lines


def draw(figure: Any, report: dict[str, Any]) -> None:
    """One picture per layer: misses per token by the slots, and distinct experts in a row."""
    layers = report["layers"]
    axes = panels(figure, len(layers))
    for axis, layer in zip(axes, layers, strict=False):
        axis.plot(range(layer["experts"] + 1), layer["misses"], label="misses per token, by slots")
        spans = [int(n) for n in layer["distinct"]]
        axis.plot(
            spans, layer["distinct"].values(), marker=".", label="distinct experts, by tokens"
        )
        foretold = layer["foretold"]
        said = "" if foretold is None else f", {100 * foretold:.0f} % foretold"
        axis.set_title(
            f"layer {layer['layer']}\ntop quarter {100 * layer['top_share']:.0f} %{said}",
            fontsize=8,
        )
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    axes[0].set_xlabel("slots; tokens in a row", fontsize=8)
    axes[0].set_ylabel("experts", fontsize=8)

"""The report of predictors that were fitted: JSON for programs, a table, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mlx_flash import __version__
from mlx_flash.calibration.report_files import PLOT, panels
from mlx_flash.calibration.settings import Settings
from mlx_flash.calibration.text import CalibrationText
from mlx_flash.common.sizes import show
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors import registry
from mlx_flash.predictors.registry import WHOLE

from .activity import WINDOWS
from .training_data import WINDOW

FORMAT_VERSION = 1
TARGETS = {"target_recall": "recall", "sparsity": "sparsity"}  # see ``registry.Training``
COLUMNS = {"rank": ("rank", "d"), "threshold": ("cut", ".4f")}  # figure -> heading, format
SCORES = {
    "activation": "by |activation| alone",
    "scaled": "by |activation| times what a row adds per unit of it on average",
    "product": "by the row's true share (an oracle)",
}


def build(
    directory: ModelDirectory,
    settings: Settings,
    text: CalibrationText,
    layers: list[dict[str, Any]],
    perplexities: dict[str, Any],
    rounds: list[dict[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
        layers: figures of each layer's predictor, see ``TrainingData.figures``.
        perplexities, rounds: see ``Checked``.
        seconds: stage -> time it took.
    """
    stride = directory.rows.layout.stride
    total = _total(layers)
    return {
        "format_version": FORMAT_VERSION,
        "mlx_flash": __version__,
        "model": directory.path.absolute().name,
        "rows_fingerprint": directory.rows.fingerprint,
        "activation": directory.ffn.activation,
        "row_bytes": stride,
        "settings": dataclasses.asdict(settings),
        "text": text.describe(),
        "perplexity": perplexities,
        "rounds": rounds,
        "seconds": seconds,
        "total": total | {"share_read": total["bytes_per_token"] / (stride * total["rows"])},
        "layers": layers,
    }


def _total(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all layers together, with or without a predictor."""
    added = ("rows", "active", "predicted", "predictor_bytes", "bytes_per_token")
    total = {name: sum(layer[name] for layer in layers) for name in added}
    active, rows = total["active"], total["rows"]
    hits = sum(layer["recall"] * layer["active"] for layer in layers)
    chosen = [layer for layer in layers if layer["kind"] != WHOLE]
    own = sum(layer["active"] for layer in chosen)
    return total | {
        "sparsity": 1 - active / rows,
        "recall": hits / active if active else 1.0,
        "predicted_per_active": total["predicted"] / active if active else 0.0,
        "predicted_per_active_where_predicted": (
            sum(layer["predicted"] for layer in chosen) / own if own else 0.0
        ),
        "layers_with_predictor": len(chosen),
        "fresh": {str(k): sum(layer["fresh"][str(k)] for layer in layers) for k in WINDOWS},
    }


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """Figures for ``predictors.safetensors``, none of which differs from run to run."""
    held_out, total = report["perplexity"]["held_out"], report["total"]
    return {
        "perplexity_dense": held_out["dense"],
        "perplexity_predicted": held_out["predicted"],
        "recall": total["recall"],
        "predicted_per_active": total["predicted_per_active"],
        "sparsity": total["sparsity"],
        "bytes_per_token": total["bytes_per_token"],
        "tokens": report["text"]["train_tokens"],
        "text": report["text"]["source"],
        "settings": report["settings"],
    }


def table(report: dict[str, Any]) -> str:
    """The report for people, as plain text."""
    settings, text, total = report["settings"], report["text"], report["total"]
    training = registry.trained()[settings["kind"]]
    wanted = f"{TARGETS[training.target]} {settings[training.target]:g}"
    lines = [
        f"{report['model']}: {settings['kind']} predictors, {wanted}, seed {settings['seed']}",
        f"Text: {text['source']}, sequences of {text['sequence']} tokens; {text['train_tokens']} "
        f"to train on, {text['validation_tokens']} for validation, "
        f"{text['held_out_tokens']} held out",
        "",
    ]
    lines += _layer_table(report["layers"], training.column)
    lines += [
        "",
        f"All layers: {100 * total['sparsity']:.2f} % of the rows zero, recall "
        f"{total['recall']:.4f}, predicted/active {total['predicted_per_active']:.2f}, predictors "
        f"{show(total['predictor_bytes'])}",
        f"Read per token at window {WINDOW}: {show(total['bytes_per_token'])}, "
        f"{100 * total['share_read']:.1f} % of the rows",
        "",
        "Perplexity            dense  predicted     loss",
    ]
    for name in ("held_out", "validation"):
        found = report["perplexity"][name]
        lines.append(
            f"  {name.replace('_', ' '):<16} {found['dense']:>8.3f} {found['predicted']:>10.3f} "
            f"{100 * found['loss']:>+7.2f} %"
        )
    for name, value in report["perplexity"]["other_scores"].items():
        dense = report["perplexity"]["held_out"]["dense"]
        what = SCORES.get(name, name)
        lines.append(f"  held out, {what}: {value:.3f} ({100 * (value / dense - 1):+.2f} %)")
    allowed, found = settings["max_loss"], report["perplexity"]["held_out"]["loss"]
    if training.raised and found > allowed:
        lines.append(
            f"The loss is above the {100 * allowed:g} % asked for; a higher --target-recall or "
            "--rank, or more --tokens, would lower it."
        )
    if report["plot"] != PLOT:
        lines += ["", report["plot"]]
    return "\n".join(lines) + "\n"


def _layer_table(layers: Sequence[dict[str, Any]], column: str) -> list[str]:
    name, shown = COLUMNS[column]
    head = (
        f"{'layer':>5} {name:>6} {'zero %':>7} {'recall':>7} "
        f"{'weighted':>8} {'false +':>8} {'pred/act':>8} {'rows':>7} {'memory':>9}  "
        f"fresh rows per token, windows 1 to {max(WINDOWS)}"
    )
    lines = [head]
    for layer in layers:
        how = "whole" if layer["kind"] == WHOLE else format(layer[column], shown)
        fresh = " ".join(f"{layer['fresh'][str(k)]:6.0f}" for k in WINDOWS)
        lines.append(
            f"{layer['layer']:>5} {how:>6} {100 * layer['sparsity']:>7.2f} {layer['recall']:>7.4f} "
            f"{layer['weighted_recall']:>8.4f} {100 * layer['false_positive_rate']:>6.2f} % "
            f"{layer['predicted_per_active']:>8.2f} {layer['predicted']:>7.1f} "
            f"{show(layer['predictor_bytes']):>9}  {fresh}"
        )
    return lines


def draw(figure: Any, report: dict[str, Any]) -> None:
    """One picture per layer: rows read afresh per token, by the window."""
    layers = report["layers"]
    axes = panels(figure, len(layers))
    for axis, layer in zip(axes, layers, strict=False):
        for name, label in (("fresh_active", "active"), ("fresh", "predicted")):
            counts = [100 * layer[name][str(k)] / layer["rows"] for k in WINDOWS]
            axis.plot(WINDOWS, counts, marker=".", label=label)
        how = f"rank {layer['rank']}" if layer["rank"] else layer["kind"]
        axis.set_title(
            f"layer {layer['layer']}, {how}\n{100 * layer['sparsity']:.1f} % zero, "
            f"recall {layer['recall']:.3f}, {layer['predicted_per_active']:.2f} predicted/active",
            fontsize=8,
        )
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    axes[0].set_xlabel("window, tokens", fontsize=8)
    axes[0].set_ylabel("rows read afresh per token, %", fontsize=8)

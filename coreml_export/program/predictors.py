"""Predictors as functions ``predict_i``: FFN input and threshold -> which rows, as fp16 0 or 1.

Exact: the gate (up where there is none) in full, rows where it is above the threshold. Low-rank:
two matrices, scores before the sigmoid held against the threshold's logit. With calibrated SwiGLU
thresholds: the size of the activation times what a row adds on average.

Knows: the kinds of ``mlx_flash.predictors`` in MIL. Does not know: how they were fitted, rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from coreml_export.errors import ExportError
from coreml_export.source.decoder_spec import Decoder, Ffn
from coreml_export.source.weights_source import Source
from mlx_flash.errors import FlashError
from mlx_flash.models import families
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor import LowRank, ResidentPart

from .coremltools_compat import TARGETS, mb, types
from .layers import Builder, activate
from .weights import Weights

ZEROS = ("relu", "relu2", "fatrelu")


@dataclass(frozen=True)
class Choice:
    """How a layer's rows are predicted.

    Args:
        kind: exact, low-rank, threshold or none (all rows).
        threshold: what the function's input is by default.
        tensors: of a low-rank predictor or a threshold, see ``predictor_file``.
        nonlinearity: between the matrices of a low-rank one.
    """

    kind: str
    threshold: float
    tensors: dict[str, np.ndarray]
    nonlinearity: str = "none"


def choose(source: Source, decoder: Decoder, wanted: str = "auto") -> list[Choice]:
    """A predictor for each layer.

    Args:
        wanted: "exact", "trained" (what ``mlx_flash calibrate`` left in the model directory), or
            "auto": exact where the activation has zeros, else trained.

    Raises:
        ExportError: there is none.
    """
    part = decoder.layers[0].ffn
    exact = part.activation in ZEROS
    if wanted not in ("auto", "exact", "trained"):
        raise ExportError(f"predictor {wanted!r}; expected auto, exact or trained")
    if wanted == "exact" and not exact:
        raise ExportError(
            f"activation {part.activation} has no zeros, so no predictor is exact; "
            "calibrate the model directory and take --predictor trained"
        )
    if exact and wanted != "trained":
        return [Choice("exact", part.threshold, {}) for _ in decoder.layers]
    directory = source.directory
    if directory is None or not (directory.path / predictor_file.NAME).is_file():
        raise ExportError(
            f"{source.path} has no trained predictors, and the paged profile needs to know which "
            "rows to bring; convert it, run mlx_flash calibrate --model DIR, and export that "
            "directory, or export --profile dense"
        )
    rows = [layer.rows for layer in directory.rows.layers]
    fingerprint = directory.rows.fingerprint
    try:
        found = predictor_file.read(
            directory.path / predictor_file.NAME, fingerprint, rows, directory.d_model
        )
    except FlashError as error:
        raise ExportError(f"predictors of {source.path}: {error}") from error
    choices = []
    for layer in found.layers:
        tensors = {k: np.array(v.astype(mx.float32)) for k, v in layer.tensors.items()}
        level = layer.threshold
        if layer.kind == "low-rank":
            level = math.log(level / (1 - level))
        choices.append(Choice(layer.kind, level, tensors, layer.nonlinearity))
    return choices


def functions(decoder: Decoder, weights: Weights, choices: list[Choice]) -> dict[str, Any]:
    """MIL functions of the predictor package by name."""
    builder = Builder(decoder, weights, 1, 0)
    return {f"predict_{i}": _function(builder, i, choice) for i, choice in enumerate(choices)}


def _function(builder: Builder, index: int, choice: Choice) -> Any:
    decoder = builder.decoder
    part = decoder.layers[index].ffn
    rows = decoder.d_ffn

    def held(name: str) -> Any:
        key = f"predictor/{index}/{name}"
        return builder.weights.table(key, lambda: choice.tensors[name])

    def low_rank(x: Any) -> Any:
        hidden = mb.linear(x=x, weight=held("first"))
        if choice.nonlinearity == "relu":
            hidden = mb.relu(x=hidden)
        bias = {"bias": held("bias")} if "bias" in choice.tensors else {}
        return mb.linear(x=hidden, weight=held("second"), **bias)

    def scores(x: Any) -> Any:
        if choice.kind == "low-rank":
            return low_rank(x)
        value = builder.linear(x, part.gate or part.up)
        if choice.kind == "exact":
            return value
        plain = Ffn(part.up, part.down, None, part.activation, part.threshold)
        size = mb.abs(x=activate(value, None, plain)[0])
        if "floor" in choice.tensors:
            guess = mb.linear(x=mb.linear(x=x, weight=held("first")), weight=held("second"))
            square = mb.add(x=mb.mul(x=guess, y=guess), y=held("floor"))
            size = mb.mul(x=size, y=mb.sqrt(x=square))
        return mb.mul(x=size, y=held("scale")) if "scale" in choice.tensors else size

    def body(ffnInput, threshold):  # noqa: ANN001, ANN202
        x = mb.reshape(x=ffnInput, shape=[1, decoder.d_model])
        if choice.kind == "none":
            level = mb.mul(x=threshold, y=np.float16(0))
            above = mb.add(x=np.ones((1, rows), np.float16), y=level)
            return mb.identity(x=above, name="mask")
        compare = mb.greater_equal if choice.kind == "low-rank" else mb.greater
        above = compare(x=scores(x), y=threshold)
        return mb.cast(x=above, dtype="fp16", name="mask")

    specs = [
        mb.TensorSpec(shape=(1, 1, decoder.d_model), dtype=types.fp16),
        mb.TensorSpec(shape=(1,), dtype=types.fp16),
    ]
    return mb._create_function(body, specs, TARGETS["iOS18"])


def mlx_masks(
    source: Source, decoder: Decoder, choices: list[Choice], kept: dict[str, np.ndarray]
) -> list[Callable[[np.ndarray], np.ndarray]]:
    """What mlx_flash's own predictors say in float32: FFN input [n, d] -> bool [n, rows].

    Args:
        kept: the model's tensors as they are stored.
    """
    return [_mlx_mask(source, decoder, i, choice, kept) for i, choice in enumerate(choices)]


def _mlx_mask(
    source: Source, decoder: Decoder, index: int, choice: Choice, kept: dict[str, np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    tensors = {k: mx.array(v) for k, v in choice.tensors.items()}
    if choice.kind == "none":
        return lambda x: np.ones((len(x), decoder.d_ffn), bool)
    if choice.kind == "low-rank":
        level = 1 / (1 + math.exp(-choice.threshold))
        ranked = LowRank(
            tensors["first"], tensors["second"], tensors.get("bias"), level, choice.nonlinearity
        )
        return lambda x: np.array(ranked.scores(mx.array(x)) >= choice.threshold)
    part = decoder.layers[index].ffn
    linear = part.gate or part.up
    bias = mx.array(kept[linear.bias.name]) if linear.bias else None
    table = families.find(source.config)
    estimate = None
    if "floor" in tensors:
        estimate = (tensors["first"], tensors["second"], tensors["floor"])
    resident = ResidentPart(
        "gate" if part.gate else "up",
        mx.array(kept[linear.weight.name]),
        bias,
        families.gate_function(table),
        families.has_zeros(table),
        0.0 if choice.kind == "exact" else choice.threshold,
        tensors.get("scale"),
        estimate,
    )

    def run(x: np.ndarray) -> np.ndarray:
        masks = []
        for row in x:
            mask = np.zeros(decoder.d_ffn, bool)
            mask[resident(mx.array(row[None])).rows] = True
            masks.append(mask)
        return np.array(masks)

    return run

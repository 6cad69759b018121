"""Predictors as functions ``predict_i``: FFN input and threshold -> which rows, as fp16 0 or 1.

Each kind of ``mlx_flash.predictors`` has a ``Program`` here, which ``registry.KINDS`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from coreml_export.errors import ExportError
from coreml_export.source.decoder_spec import Decoder, Ffn
from coreml_export.source.weights_source import Source
from mlx_flash.errors import FlashError
from mlx_flash.models import families
from mlx_flash.predictors import predictor_file, registry
from mlx_flash.predictors.low_rank import logit
from mlx_flash.predictors.predictor import Projection
from mlx_flash.predictors.predictor_file import LayerPredictor

from .coremltools_compat import TARGETS, mb, types
from .layers import Builder, activate
from .weights import Weights

ZEROS = ("relu", "relu2", "fatrelu")


@dataclass(frozen=True)
class Choice:
    """How a layer's rows are predicted.

    Args:
        layer: the predictor, its tensors in float32.
        program: what computes it; None where all rows are named.
        threshold: what the function's input is by default.
    """

    layer: LayerPredictor
    program: type[Program] | None
    threshold: float

    @property
    def kind(self) -> str:
        """For the manifest: exact, a trained kind, or none for all rows."""
        return "exact" if self.program is ExactProgram else self.layer.kind


def choose(source: Source, decoder: Decoder, wanted: str = "auto") -> list[Choice]:
    """A predictor for each layer.

    Args:
        wanted: "exact", "trained" (what ``mlx_flash calibrate`` left in the model directory), or
            "auto": exact where the activation has zeros, else trained.

    Raises:
        ExportError: the model has no such predictor, or Core ML cannot compute it.
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
        layer = LayerPredictor("gate" if part.gate else "up", 0.0)
        return [_choice(layer, part) for _ in decoder.layers]
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
    for layer in found.layers:
        layer.tensors = {name: t.astype(mx.float32) for name, t in layer.tensors.items()}
    return [_choice(layer, part) for layer in found.layers]


def trained(kinds: Iterable[str]) -> bool:
    """Whether any of the layers' kinds, as ``Choice.kind`` names them, was fitted on text."""
    return any(kind not in ("exact", "none") for kind in kinds)


def wanted_by(kinds: Sequence[str]) -> str:
    """What ``choose`` was asked for where it gave the layers these kinds."""
    return "exact" if set(kinds) == {"exact"} else "trained"


def _choice(layer: LayerPredictor, part: Ffn) -> Choice:
    if layer.whole:
        return Choice(layer, None, layer.threshold)
    if not (name := registry.KINDS[layer.kind].coreml):
        raise ExportError(
            f"predictors of kind {layer.kind} have no Core ML program; calibrate the model "
            "directory with another --kind, or export --profile dense"
        )
    program = registry.load(name)
    return Choice(layer, program, program.level(layer, part))


def functions(decoder: Decoder, weights: Weights, choices: list[Choice]) -> dict[str, Any]:
    """MIL functions of the predictor package by name."""
    builder = Builder(decoder, weights, 1, 0)
    return {f"predict_{i}": _function(builder, i, choice) for i, choice in enumerate(choices)}


class Program:
    """How a kind of predictor is computed in Core ML; ``registry`` names one for each kind.

    A row is named where its score is above the threshold that the function is given.

    Args:
        builder: makes projections.
        part: the layer's FFN.
        tensors: makes a constant of each tensor of the predictor.
        layer: the predictor.
    """

    or_equal = False  # a score that equals the threshold names its row

    def __init__(
        self, builder: Builder, part: Ffn, tensors: Callable[[str], Any], layer: LayerPredictor
    ) -> None:
        self.builder, self.part, self.tensors, self.layer = builder, part, tensors, layer

    @staticmethod
    def level(layer: LayerPredictor, part: Ffn) -> float:
        """The threshold that scores are held against."""
        return layer.threshold

    def scores(self, x: Any) -> Any:
        """Scores [1, rows] of an FFN input x [1, d_model]."""
        raise NotImplementedError


class ExactProgram(Program):
    """The gate, or up in ungated FFNs, compared with the argument where the activation begins."""

    @staticmethod
    def level(layer: LayerPredictor, part: Ffn) -> float:
        """See ``Program``."""
        return part.threshold

    def scores(self, x: Any) -> Any:
        """See ``Program``."""
        return self.builder.linear(x, self.part.gate or self.part.up)


class LowRankProgram(Program):
    """Two matrices; scores before the sigmoid, held against the threshold's logit."""

    or_equal = True

    @staticmethod
    def level(layer: LayerPredictor, part: Ffn) -> float:
        """See ``Program``."""
        return logit(layer.threshold)

    def scores(self, x: Any) -> Any:
        """See ``Program``."""
        hidden = mb.linear(x=x, weight=self.tensors("first"))
        if self.layer.nonlinearity == "relu":
            hidden = mb.relu(x=hidden)
        bias = {"bias": self.tensors("bias")} if "bias" in self.layer.tensors else {}
        return mb.linear(x=hidden, weight=self.tensors("second"), **bias)


class ThresholdProgram(Program):
    """The size of the activation times what a row adds per unit of it, see ``ResidentPart``."""

    def scores(self, x: Any) -> Any:
        """See ``Program``."""
        part = self.part
        value = self.builder.linear(x, part.gate or part.up)
        plain = Ffn(part.up, part.down, None, part.activation, part.threshold)
        size = mb.abs(x=activate(value, None, plain)[0])
        if "floor" in self.layer.tensors:
            guess = mb.linear(x=x, weight=self.tensors("first"))
            guess = mb.linear(x=guess, weight=self.tensors("second"))
            square = mb.add(x=mb.mul(x=guess, y=guess), y=self.tensors("floor"))
            size = mb.mul(x=size, y=mb.sqrt(x=square))
        return mb.mul(x=size, y=self.tensors("scale")) if "scale" in self.layer.tensors else size


def _function(builder: Builder, index: int, choice: Choice) -> Any:
    decoder = builder.decoder
    tensors = choice.layer.tensors

    def constant(name: str) -> Any:
        key = f"predictor/{index}/{name}"
        return builder.weights.table(key, lambda: np.array(tensors[name]))

    def body(ffnInput, threshold):  # noqa: ANN001, ANN202
        x = mb.reshape(x=ffnInput, shape=[1, decoder.d_model])
        if choice.program is None:
            level = mb.mul(x=threshold, y=np.float16(0))
            above = mb.add(x=np.ones((1, decoder.d_ffn), np.float16), y=level)
            return mb.identity(x=above, name="mask")
        program = choice.program(builder, decoder.layers[index].ffn, constant, choice.layer)
        compare = mb.greater_equal if program.or_equal else mb.greater
        return mb.cast(x=compare(x=program.scores(x), y=threshold), dtype="fp16", name="mask")

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
    part = decoder.layers[index].ffn
    linear = part.gate or part.up
    bias = mx.array(kept[linear.bias.name]) if linear.bias else None
    weight = mx.array(kept[linear.weight.name])
    projection = Projection("gate" if part.gate else "up", weight, bias)
    predictor = choice.layer.build(families.find(source.config), decoder.d_ffn, projection)
    return lambda x: np.concatenate([np.array(predictor.mask(mx.array(row[None]))) for row in x])

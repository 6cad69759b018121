"""The kinds of predictors: one entry a kind, read by everything that deals with kinds.

To add a kind, write its module and add its entry to ``KINDS``. An entry names code as
"module:name", which is imported when it is used: this module needs no MLX, so the command line
takes its choices from here, and it may name code of packages that may not be imported here
(``calibration`` for fitting, ``coreml_export`` for Core ML).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

WHOLE = "none"  # kind of a layer whose rows are all read
NONLINEARITIES = ("none", "relu")  # between the matrices of a low-rank predictor
DIMENSIONS = ("rows", "d_model")  # words in shapes that a model gives; others are free


@dataclass(frozen=True)
class Training:
    """What a kind learns from text, and how.

    Args:
        tensors: name of each tensor of a layer in the file -> its shape in words: "rows",
            "d_model", or another word for a size that is the same wherever it stands.
        needed: names of tensors that every layer has.
        together: names of tensors of which a layer has all or none.
        fitter: "module:class" of a ``fitting.Fitter``; None where ``calibrate`` cannot fit it.
        records: part of the text -> what is recorded there, see ``calibration.recordings``.
        tokens: to train on, where nothing else is asked for.
        target: the setting that says what a layer is fitted for: "target_recall" or "sparsity".
        raised: whether the target of a layer is raised while the perplexity rises by more than
            ``max_loss``; else what the target costs is reported.
        column: what the report's table shows of a layer, "rank" or "threshold".
        options: of ``mlx_flash calibrate`` to fit it, for error messages.
    """

    tensors: Mapping[str, tuple[str, ...]]
    needed: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    fitter: str | None = None
    records: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: int = 16384
    target: str = "target_recall"
    raised: bool = False
    column: str = "threshold"
    options: str = ""


@dataclass(frozen=True)
class PredictorKind:
    """One kind of predictor.

    Args:
        name: for users and in files.
        build: "module:function" that makes a layer's ``Predictor``, see ``LayerPredictor.build``.
        exact: no row that fires is ever missed.
        resident: the projection that the activation is applied to stays in memory.
        training: of kinds that are learned; None where the model's own weights are all it takes.
        coreml: "module:class" of its Core ML program, see ``coreml_export.program.predictors``;
            None where there is none.
    """

    name: str
    build: str
    exact: bool = False
    resident: bool = False
    training: Training | None = None
    coreml: str | None = None


def _exact(name: str) -> PredictorKind:
    build = "mlx_flash.predictors.resident_part:build"
    program = "coreml_export.program.predictors:ExactProgram"
    return PredictorKind(name, build, exact=True, resident=True, coreml=program)


LOW_RANK = PredictorKind(
    "low-rank",
    "mlx_flash.predictors.low_rank:build",
    training=Training(
        tensors={"first": ("rank", "d_model"), "second": ("rows", "rank"), "bias": ("rows",)},
        needed=("first", "second"),
        fitter="mlx_flash.calibration.neurons.low_rank_fitter:LowRankFitter",
        records={"train": ("x", "active"), "validation": ("x", "active", "h")},
        tokens=16384,
        target="target_recall",
        raised=True,
        column="rank",
    ),
    coreml="coreml_export.program.predictors:LowRankProgram",
)

THRESHOLD = PredictorKind(
    "threshold",
    "mlx_flash.predictors.resident_part:build",
    resident=True,
    training=Training(
        tensors={
            "scale": ("rows",),
            "first": ("rank", "d_model"),
            "second": ("rows", "rank"),
            "floor": ("rows",),
        },
        together=("first", "second", "floor"),
        fitter="mlx_flash.calibration.neurons.threshold_fitter:ThresholdFitter",
        records={"train": ("x", "up_squares"), "validation": ("x", "gate", "h")},
        tokens=4096,
        target="sparsity",
        column="threshold",
        options="--kind threshold --sparsity 0.5",
    ),
    coreml="coreml_export.program.predictors:ThresholdProgram",
)

KINDS: dict[str, PredictorKind] = {
    kind.name: kind for kind in (_exact("gate"), _exact("up"), LOW_RANK, THRESHOLD)
}


def names() -> tuple[str, ...]:
    """What a user may ask a model to be run with."""
    return ("auto", WHOLE, *KINDS)


def trained() -> dict[str, Training]:
    """Kinds that are kept in a file: name -> how they are learned."""
    return {name: kind.training for name, kind in KINDS.items() if kind.training}


def fitted() -> tuple[str, ...]:
    """Kinds that ``calibrate`` can fit."""
    return tuple(name for name, training in trained().items() if training.fitter)


def load(reference: str) -> Any:
    """The code that an entry names as "module:name"."""
    return resolve_name(reference)

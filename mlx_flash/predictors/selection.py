"""Which predictors a model directory is run with, and making them.

Knows: what each kind needs of the model (an activation with zeros, a gate, a trained file). Does
not know: budgets, slots. What cannot work is an error that says what would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import PredictorError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.families import Ffn, gate_function, has_zeros, projections
from mlx_flash.models.quantized_rows import QuantScheme, part_names
from mlx_flash.paging.row_weights import resident_part
from mlx_flash.storage.reader import RowReader

from . import predictor_file
from .predictor import Everything, LowRank, Predictor, ResidentPart
from .predictor_file import Predictors

NAMES = ("auto", "none", "gate", "up", "low-rank", "threshold")
TOKENS = "4"  # a cache is to hold what so many tokens in a row use
SHARE = 0.1  # of the rows of a layer, where nothing was measured


@dataclass
class Selection:
    """Predictors of one kind for a model.

    Args:
        kind: gate, up, low-rank or threshold.
        exact: nothing that fires is missed.
        provides: the part of a row that is resident, if one is.
        nbytes: of each layer's predictor.
        demand: of each layer, rows that a few tokens in a row use; None where not measured.
        measured: figures of the calibration.
        file: the trained predictors, for low-rank and threshold.
        scheme: how rows are packed; None for floats.
    """

    kind: str
    exact: bool
    provides: str | None
    nbytes: tuple[int, ...]
    demand: tuple[float, ...]
    measured: dict[str, Any]
    file: Predictors | None = None
    scheme: QuantScheme | None = None

    def build(self, reader: RowReader, layer: int, mlp: nn.Module, ffn: Ffn) -> Predictor:
        """The predictor of one layer.

        Args:
            mlp: the layer's FFN module, its biases loaded.
        """
        trained = self.file.layers[layer] if self.file else None
        if trained and trained.kind == "none":
            return Everything(reader.file.layers[layer].rows)
        if trained and self.kind == "low-rank":
            tensors = trained.tensors
            bias = tensors.get("bias")
            mx.eval(list(tensors.values()))
            return LowRank(
                tensors["first"], tensors["second"], bias, trained.threshold, trained.nonlinearity
            )
        if trained:
            mx.eval(list(trained.tensors.values()))
        part = self.provides or ""
        module = mlp[projections(ffn)[part]]
        bias = module.bias if "bias" in module else None
        if bias is not None and ffn.fused:
            bias = mx.split(bias, 2)[0]
        return ResidentPart(
            part,
            resident_part(reader, layer, part, self.scheme),
            bias,
            gate_function(ffn),
            has_zeros(ffn),
            trained.threshold if trained else 0.0,
            trained.tensors.get("scale") if trained else None,
            trained.estimate if trained else None,
        )


def select(directory: ModelDirectory, name: str = "auto") -> Selection | None:
    """What a predictor's name stands for with this model; None for reading every row.

    Args:
        name: one of ``NAMES``. auto takes the predictors that were trained, else the exact gate or
            up where the activation has zeros, else none.

    Raises:
        PredictorError: the model cannot be run that way; says how it can.
    """
    if name not in NAMES:
        raise PredictorError(f"predictor {name!r}; expected one of {', '.join(NAMES)}")
    if name == "none":
        return None
    if directory.unit != "neuron":
        return _no_neurons(directory, name)
    path = directory.path / predictor_file.NAME
    ffn = directory.ffn
    if name in predictor_file.KINDS or (name == "auto" and path.exists()):
        return _trained(directory, name)
    if name == "auto":
        return _exact(directory) if has_zeros(ffn) else None
    _check_part(ffn, name)
    return _exact(directory)


def _no_neurons(directory: ModelDirectory, name: str) -> None:
    """Where rows are experts or whole layers there is nothing to predict."""
    if name == "auto":
        return
    if directory.mixture:
        raise PredictorError(
            f"predictor {name}: this model is a mixture of experts, its own router says which "
            "experts a token needs; leave --predictor out"
        )
    raise PredictorError(
        f"predictor {name}: the FFN weights of this model are quantised in groups that span many "
        "neurons, so whole layers are read; leave --predictor out, or convert the float checkpoint"
    )


def _decisive(ffn: Ffn) -> str:
    """The part whose output the activation is applied to."""
    return "gate" if "gate" in ffn.parts else "up"


def _check_part(ffn: Ffn, name: str) -> None:
    part = _decisive(ffn)
    if not has_zeros(ffn):
        raise PredictorError(
            f"predictor {name}: the activation of this model, {ffn.activation}, has no zeros, so "
            "every row is needed for every token. What works: 'none' (exact), or 'threshold' "
            "(lossy: small activations are dropped) after "
            "mlx_flash calibrate --kind threshold --sparsity 0.5"
        )
    if name != part:
        kind = "a gate" if part == "gate" else "no gate"
        raise PredictorError(
            f"predictor {name}: the FFN of this model has {kind}, its exact predictor is {part!r}"
        )


def _part_bytes(directory: ModelDirectory, part: str) -> tuple[int, ...]:
    rows = directory.rows
    names = part_names(part, directory.scheme)
    nbytes = sum(p.nbytes for p in rows.layout.parts if p.name in names)
    return tuple(layer.rows * nbytes for layer in rows.layers)


def _exact(directory: ModelDirectory) -> Selection:
    part = _decisive(directory.ffn)
    demand = tuple(SHARE * layer.rows for layer in directory.rows.layers)
    nbytes = _part_bytes(directory, part)
    return Selection(part, True, part, nbytes, demand, {}, scheme=directory.scheme)


def _trained(directory: ModelDirectory, name: str) -> Selection:
    path = directory.path / predictor_file.NAME
    layers = directory.rows.layers
    kind = "" if name == "low-rank" else " --kind threshold --sparsity 0.5"
    advice = f"train them with: mlx_flash calibrate --model {directory.path}{kind}"
    if not path.exists():
        raise PredictorError(f"{directory.path} has no {name} predictors; {advice}")
    rows = [layer.rows for layer in layers]
    scheme, width = directory.scheme, directory.d_model
    file = predictor_file.read(path, directory.rows.fingerprint, rows, width)
    if name not in ("auto", file.kind):
        raise PredictorError(f"{path} holds predictors of kind {file.kind}, not {name}; {advice}")
    demand = tuple(
        layer.demand.get(TOKENS, SHARE * n) for layer, n in zip(file.layers, rows, strict=True)
    )
    if file.kind == "low-rank":
        nbytes = tuple(layer.nbytes for layer in file.layers)
        return Selection("low-rank", False, None, nbytes, demand, file.measured, file, scheme)
    part = _decisive(directory.ffn)
    nbytes = tuple(
        n + layer.nbytes for n, layer in zip(_part_bytes(directory, part), file.layers, strict=True)
    )
    return Selection("threshold", False, part, nbytes, demand, file.measured, file, scheme)

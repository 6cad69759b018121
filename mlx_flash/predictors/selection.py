"""Which predictors a model directory is run with; errors say what would work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_flash.errors import PredictorError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.families import Ffn, has_zeros
from mlx_flash.models.quantized_rows import part_names

from . import predictor_file, registry
from .predictor_file import LayerPredictor
from .registry import WHOLE
from .resident_part import deciding_part

TOKENS = "4"  # consecutive tokens whose rows a cache is to hold
SHARE = 0.1  # demand of a layer as a share of its rows, where nothing was measured


@dataclass(frozen=True)
class Selection:
    """Predictors of one kind for a model.

    Args:
        kind: name of the kind, see ``registry``.
        layers: each layer's predictor.
        nbytes: memory of each layer's predictor.
        demand: of each layer, the number of rows that a few tokens in a row use.
        exact: no row that fires is missed.
        provides: the part of a row that stays in memory, if one does.
        trained: they come from ``predictors.safetensors``.
        measured: figures of the calibration; empty where nothing was calibrated.
    """

    kind: str
    layers: tuple[LayerPredictor, ...]
    nbytes: tuple[int, ...]
    demand: tuple[float, ...]
    exact: bool
    provides: str | None
    trained: bool = False
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def allows_prefetch(self) -> bool:
        """Whether rows may be read before a layer's turn: a wrong one costs bytes, no more.

        Not where a row must not be missed, nor where a projection is computed in full anyway.
        """
        return not self.exact and self.provides is None


def select(directory: ModelDirectory, name: str = "auto") -> Selection | None:
    """What a predictor's name stands for with this model; None for reading every row.

    Args:
        name: one of ``registry.names()``. auto takes the predictors that were trained, else the
            exact gate or up where the activation has zeros, else none.

    Raises:
        PredictorError: the model cannot be run that way; says how it can.
    """
    if name not in registry.names():
        known = ", ".join(registry.names())
        raise PredictorError(f"predictor {name!r}; expected one of {known}")
    if name == WHOLE:
        return None
    if directory.unit != "neuron":
        return _no_neurons(directory, name)
    path = directory.path / predictor_file.NAME
    ffn = directory.ffn
    if name in registry.trained() or (name == "auto" and path.exists()):
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


def _check_part(ffn: Ffn, name: str) -> None:
    part = deciding_part(ffn)
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


def _exact(directory: ModelDirectory) -> Selection:
    part = deciding_part(directory.ffn)
    layers = directory.rows.layers
    demand = tuple(SHARE * layer.rows for layer in layers)
    return _selection(directory, part, [LayerPredictor(part, 0.0) for _ in layers], demand)


def _trained(directory: ModelDirectory, name: str) -> Selection:
    path = directory.path / predictor_file.NAME
    if not path.exists():
        raise PredictorError(
            f"{directory.path} has no {name} predictors; {_advice(directory, name)}"
        )
    rows = [layer.rows for layer in directory.rows.layers]
    file = predictor_file.read(path, directory.rows.fingerprint, rows, directory.d_model)
    if name not in ("auto", file.kind):
        raise PredictorError(
            f"{path} holds predictors of kind {file.kind}, not {name}; {_advice(directory, name)}"
        )
    demand = tuple(
        layer.demand.get(TOKENS, SHARE * n) for layer, n in zip(file.layers, rows, strict=True)
    )
    return _selection(directory, file.kind, file.layers, demand, file.measured)


def _advice(directory: ModelDirectory, name: str) -> str:
    training = registry.trained()[name]
    options = training.options
    if training.fitter is None:
        return (
            f"mlx_flash calibrate does not fit this kind: {predictor_file.NAME} has to be put there"
        )
    return f"train them with: mlx_flash calibrate --model {directory.path} {options}".rstrip()


def _selection(
    directory: ModelDirectory,
    name: str,
    layers: list[LayerPredictor],
    demand: tuple[float, ...],
    measured: dict[str, Any] | None = None,
) -> Selection:
    """Figures of predictors of a kind; ``measured`` is None where they were not trained."""
    kind = registry.KINDS[name]
    part = deciding_part(directory.ffn) if kind.resident else None
    held = _part_bytes(directory, part) if part else (0,) * len(layers)
    nbytes = tuple(n + layer.nbytes for n, layer in zip(held, layers, strict=True))
    return Selection(
        name, tuple(layers), nbytes, demand, kind.exact, part, measured is not None, measured or {}
    )


def _part_bytes(directory: ModelDirectory, part: str) -> tuple[int, ...]:
    """Memory that one part of all rows takes, of each layer."""
    rows = directory.rows
    names = part_names(part, directory.scheme)
    nbytes = sum(p.nbytes for p in rows.layout.parts if p.name in names)
    return tuple(layer.rows * nbytes for layer in rows.layers)

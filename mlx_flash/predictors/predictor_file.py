"""``predictors.safetensors``: the predictors that ``calibrate`` fitted to one model directory.

A plain safetensors file. Its tensors are named ``layers.{i}.{name}``, with the names and shapes of
``registry.Training.tensors``; the metadata name the row file they belong to, each layer's settings
and what was measured. The file is whole or not there: it is written beside and renamed, and nothing
else in the directory changes with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.common.files import replacing
from mlx_flash.common.json_reader import entry, fields, items, number, parse_json, show, text
from mlx_flash.errors import DamagedError, PredictorError
from mlx_flash.models.dtypes import BIT_VIEWS
from mlx_flash.models.families import Ffn
from mlx_flash.storage.safetensors_header import check_file

from . import registry
from .predictor import Everything, Predictor, Projection
from .registry import DIMENSIONS, NONLINEARITIES, WHOLE

NAME = "predictors.safetensors"
FORMAT = "mlx_flash.predictors"
FORMAT_VERSION = 1
FIGURES = {"perplexity_dense", "perplexity_predicted"}  # of the calibration, shown to people
SETTINGS = ("kind", "threshold", "nonlinearity", "demand")  # of a layer, in the metadata


@dataclass
class LayerPredictor:
    """One layer's predictor.

    Args:
        kind: a name in ``registry.KINDS``, or "none" for a layer that is better read whole.
        threshold: of the sigmoid (low-rank), or of the activation (threshold).
        nonlinearity: between the matrices of a low-rank one.
        tensors: see ``registry.Training.tensors``.
        demand: mean number of rows that n tokens in a row used in calibration, by n as text: what
            a cache for them would hold.
    """

    kind: str
    threshold: float = 0.5
    nonlinearity: str = "none"
    tensors: dict[str, mx.array] = field(default_factory=dict)
    demand: dict[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Nothing is predicted: all rows are read."""
        return self.kind == WHOLE

    @property
    def rank(self) -> int | None:
        """Width between two low-rank matrices, where there are any."""
        return self.tensors["first"].shape[0] if "first" in self.tensors else None

    @property
    def nbytes(self) -> int:
        """Memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def build(self, ffn: Ffn, rows: int, projection: Projection | None = None) -> Predictor:
        """The predictor, its tensors in memory.

        Args:
            ffn: of the model's family.
            rows: of the layer.
            projection: that the activation is applied to. Kinds that are ``resident`` compute it;
                without it they can only be asked for ``mask`` with its output at hand.
        """
        if self.whole:
            return Everything(rows)
        mx.eval(list(self.tensors.values()))
        return registry.load(registry.KINDS[self.kind].build)(self, ffn, projection)


@dataclass
class Predictors:
    """A file's contents.

    Args:
        kind: one of ``registry.trained()``.
        rows_fingerprint: of the row file that they were fitted to.
        layers: one for each layer.
        measured: figures of the calibration, see ``calibrate``.
    """

    kind: str
    rows_fingerprint: str
    layers: list[LayerPredictor]
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory that all tensors take."""
        return sum(layer.nbytes for layer in self.layers)


def write(path: Path, predictors: Predictors) -> None:
    """Write ``path``, whole or not at all."""
    tensors = {
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(predictors.layers)
        for name, tensor in layer.tensors.items()
    }
    settings = [{name: getattr(layer, name) for name in SETTINGS} for layer in predictors.layers]
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": predictors.kind,
        "rows_fingerprint": predictors.rows_fingerprint,
        "layers": json.dumps(settings),
        "measured": json.dumps(predictors.measured),
        "sha256": _sha256(tensors),
    }
    with replacing(path) as temporary:
        try:
            mx.save_safetensors(str(temporary), tensors or {"none": mx.zeros((1,))}, metadata)
        except RuntimeError as error:  # mlx's own, for a full disk, too
            raise PredictorError(
                f"writing {path} failed: {error}; make room and run the same command again"
            ) from error


def read(path: Path, fingerprint: str, rows: Sequence[int], d_model: int) -> Predictors:
    """The predictors in a file, their tensors not read yet.

    Args:
        fingerprint: of the model's row file.
        rows: rows of each layer.
        d_model: width of the hidden state.

    Raises:
        PredictorError: no such file, another format, or made for another model.
        DamagedError: it cannot be read.
    """
    if not path.is_file():
        raise PredictorError(f"there is no {path}; make it with mlx_flash calibrate")
    tensors, metadata = _load(path)
    if metadata.get("format") != FORMAT:
        raise PredictorError(f"{path} does not hold predictors of mlx_flash; calibrate again")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise PredictorError(
            f"{path} has format version {show(metadata.get('format_version'))}, this version of "
            f"mlx_flash reads {FORMAT_VERSION}; update mlx_flash or calibrate again"
        )
    try:
        settings = items(parse_json(entry(metadata, "layers", "it")), "layers")
        layers = [_layer(fields(one, f"layer {i}")) for i, one in enumerate(settings)]
        measured = fields(parse_json(entry(metadata, "measured", "it")), "measured")
        for name in FIGURES & measured.keys():
            number(measured[name], name)
        kind, rows_of = (entry(metadata, name) for name in ("kind", "rows_fingerprint"))
        found = Predictors(kind, rows_of, layers, measured)
    except ValueError as error:
        raise DamagedError(
            f"the metadata of {path} cannot be read: {error}; calibrate again"
        ) from error
    if found.rows_fingerprint != fingerprint:
        raise PredictorError(
            f"{path} was fitted to another model or another conversion of it (rows "
            f"{found.rows_fingerprint[:12]}, this model's are {fingerprint[:12]}); calibrate again"
        )
    if len(layers) != len(rows):
        raise PredictorError(
            f"{path} has predictors for {len(layers)} layers, the model has {len(rows)}; "
            "calibrate again"
        )
    if found.kind not in registry.trained():
        known = " or ".join(registry.trained())
        raise PredictorError(
            f"{path} holds predictors of kind {found.kind!r}, this version of mlx_flash knows "
            f"{known}; update mlx_flash or calibrate again"
        )
    for i, layer in enumerate(layers):
        names = () if layer.whole else registry.trained()[found.kind].tensors
        layer.tensors = {
            name: tensors[f"layers.{i}.{name}"] for name in names if f"layers.{i}.{name}" in tensors
        }
        _check(f"{path}, layer {i}", found.kind, layer, {"rows": rows[i], "d_model": d_model})
    return found


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A file's tensors, not read yet, and its metadata; DamagedError where it is damaged."""
    try:
        check_file(path)
        tensors, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise DamagedError(f"{path} is not a safetensors file: {error}; calibrate again") from error
    return tensors, metadata


def _layer(said: dict[str, Any]) -> LayerPredictor:
    """One layer's settings; ValueError where they are not what ``write`` gives."""
    if strange := said.keys() - set(SETTINGS):
        raise ValueError(f"settings of a layer that are not known: {', '.join(sorted(strange))}")
    demand = fields(said.get("demand", {}), "demand")
    return LayerPredictor(
        text(said.get("kind"), "kind"),
        number(said.get("threshold", 0.5), "threshold"),
        text(said.get("nonlinearity", "none"), "nonlinearity"),
        demand={n: number(rows, "demand") for n, rows in demand.items()},
    )


def verify(path: Path) -> None:
    """Hash a file's tensors again; raises DamagedError where they are not what was written."""
    tensors, metadata = _load(path)
    try:
        tensors.pop("none", None)
        found = _sha256(tensors)
    except (RuntimeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {error}; calibrate again") from error
    if found != metadata.get("sha256"):
        raise DamagedError(f"{path} is damaged: sha256 {found}; calibrate again")


def _check(where: str, kind: str, layer: LayerPredictor, sizes: dict[str, int]) -> None:
    """Raise unless a layer of a file of a kind is as ``registry`` says."""
    # A resident part is left out of all slots, so a layer cannot do without it.
    known = (kind,) if registry.KINDS[kind].resident else (kind, WHOLE)
    if layer.kind not in known or layer.nonlinearity not in NONLINEARITIES:
        raise PredictorError(
            f"{where}: unknown kind {layer.kind!r} or nonlinearity {layer.nonlinearity!r} in a "
            f"file of kind {kind}; update mlx_flash or calibrate again"
        )
    if not math.isfinite(layer.threshold):
        raise PredictorError(f"{where}: threshold {layer.threshold}; calibrate again")
    if layer.whole:
        return
    training = registry.trained()[kind]
    needed = training.needed
    if set(training.together) & layer.tensors.keys():
        needed += training.together
    if missing := [name for name in needed if name not in layer.tensors]:
        raise DamagedError(f"{where}: no {', '.join(missing)}; calibrate again")
    for name, tensor in layer.tensors.items():
        words = training.tensors[name]
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise PredictorError(f"{where}: {name} is no tensor of floats; calibrate again")
        for word, size in zip(words, tensor.shape, strict=False):
            if word not in DIMENSIONS:
                sizes.setdefault(word, size)
        expected = tuple(sizes.get(word, 0) for word in words)
        if tensor.shape != expected:
            raise PredictorError(
                f"{where}: {name} has shape {tensor.shape}, the model needs {expected}; "
                "calibrate again"
            )


def _sha256(tensors: dict[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        raw = tensor.view(BIT_VIEWS[tensor.dtype.size])
        mx.eval(raw)
        digest.update(np.ascontiguousarray(np.array(raw, copy=False)).data)
    return digest.hexdigest()

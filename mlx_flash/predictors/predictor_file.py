"""``predictors.safetensors``: the predictors that ``calibrate`` fitted to one model directory.

A plain safetensors file. Tensors ``layers.{i}.first``, ``.second``, ``.bias`` of a low-rank
predictor, ``layers.{i}.scale``, ``.first``, ``.second``, ``.floor`` of a threshold; the metadata
name the row file they belong to, each layer's settings and what was measured. The file is whole or
not there: it is written beside and renamed, and nothing else in the directory changes with it.

Knows: names, shapes, hashes. Does not know: how predictors are fitted or used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.common.files import replacing
from mlx_flash.errors import DamagedError, PredictorError
from mlx_flash.models.dtypes import UNITS

from .predictor import NONLINEARITIES

NAME = "predictors.safetensors"
FORMAT = "mlx_flash.predictors"
FORMAT_VERSION = 1
KINDS = ("low-rank", "threshold")
ESTIMATE = ("first", "second", "floor")
TENSORS = {
    "low-rank": ("first", "second", "bias"),
    "threshold": ("scale", *ESTIMATE),
    "none": (),
}
NEEDED = {"low-rank": ("first", "second"), "threshold": (), "none": ()}


@dataclass
class LayerPredictor:
    """One layer's predictor.

    Args:
        kind: low-rank, threshold, or none for a layer that is better read whole.
        threshold: of the sigmoid (low-rank), or of the activation (threshold).
        nonlinearity: between the matrices of a low-rank one.
        tensors: first [rank, d_model], second [rows, rank], bias [rows]; of a threshold scale
            [rows], and all or none of first, second and floor [rows], see ``ResidentPart``.
        demand: rows that this many tokens in a row used on average in calibration, by number of
            tokens as text; what a cache for them would hold.
    """

    kind: str
    threshold: float = 0.5
    nonlinearity: str = "none"
    tensors: dict[str, mx.array] = field(default_factory=dict)
    demand: dict[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """Width between the two matrices of a low-rank one."""
        return self.tensors["first"].shape[0] if "first" in self.tensors else None

    @property
    def estimate(self) -> tuple[mx.array, mx.array, mx.array] | None:
        """What a threshold knows of up's output, see ``ResidentPart``."""
        if self.kind != "threshold" or "floor" not in self.tensors:
            return None
        return self.tensors["first"], self.tensors["second"], self.tensors["floor"]

    @property
    def nbytes(self) -> int:
        """Memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class Predictors:
    """A file's contents.

    Args:
        kind: low-rank or threshold.
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
    settings = []
    for layer in predictors.layers:
        settings.append({k: v for k, v in asdict(_bare(layer)).items() if k != "tensors"})
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
        raise PredictorError(f"there is no {path}")
    try:
        tensors, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise DamagedError(f"{path} is no safetensors file: {error}; calibrate again") from error
    if metadata.get("format") != FORMAT:
        raise PredictorError(f"{path} does not hold predictors of mlx_flash; calibrate again")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise PredictorError(
            f"{path} has format version {metadata.get('format_version')}, this version of "
            f"mlx_flash reads {FORMAT_VERSION}; update mlx_flash or calibrate again"
        )
    try:
        settings = json.loads(metadata["layers"])
        layers = [LayerPredictor(**entry) for entry in settings]
        found = Predictors(
            metadata["kind"],
            metadata["rows_fingerprint"],
            layers,
            json.loads(metadata["measured"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"the metadata of {path} make no sense; calibrate again") from error
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
    for i, layer in enumerate(layers):
        layer.tensors = {
            name: tensors[f"layers.{i}.{name}"]
            for name in TENSORS.get(layer.kind, ())
            if f"layers.{i}.{name}" in tensors
        }
        _check(path, i, layer, rows[i], d_model)
    return found


def verify(path: Path) -> None:
    """Hash a file's tensors again; raises DamagedError where they are not what was written."""
    try:
        tensors, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        tensors.pop("none", None)
        found = _sha256(tensors)
    except (RuntimeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {error}; calibrate again") from error
    if found != metadata.get("sha256"):
        raise DamagedError(f"{path} is damaged: sha256 {found}; calibrate again")


def _bare(layer: LayerPredictor) -> LayerPredictor:
    return LayerPredictor(layer.kind, layer.threshold, layer.nonlinearity, {}, layer.demand)


def _check(path: Path, index: int, layer: LayerPredictor, rows: int, d_model: int) -> None:
    if layer.kind not in TENSORS or layer.nonlinearity not in NONLINEARITIES:
        raise PredictorError(
            f"{path}, layer {index}: unknown kind {layer.kind!r} or nonlinearity "
            f"{layer.nonlinearity!r}; update mlx_flash or calibrate again"
        )
    needed = NEEDED[layer.kind]
    if layer.kind == "threshold" and set(ESTIMATE) & layer.tensors.keys():
        needed = ESTIMATE
    if missing := [name for name in needed if name not in layer.tensors]:
        raise DamagedError(f"{path}, layer {index}: no {', '.join(missing)}; calibrate again")
    rank = layer.rank or 0
    expected = dict.fromkeys(("bias", "scale", "floor"), (rows,))
    expected |= {"first": (rank, d_model), "second": (rows, rank)}
    for name, tensor in layer.tensors.items():
        if tensor.shape != expected[name]:
            raise PredictorError(
                f"{path}, layer {index}: {name} has shape {tensor.shape}, the model needs "
                f"{expected[name]}; calibrate again"
            )
    if not math.isfinite(layer.threshold):
        raise PredictorError(f"{path}, layer {index}: threshold {layer.threshold}; calibrate again")


def _sha256(tensors: dict[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        raw = tensor.view(UNITS[tensor.dtype.size])
        mx.eval(raw)
        digest.update(np.ascontiguousarray(np.array(raw, copy=False)).data)
    return digest.hexdigest()

"""What a model's FFNs do on a text, written to disk while the model runs, read back layer by layer.

``DIR.calibrating`` beside the model directory holds one file for each layer, part of the text and
quantity: ``x`` (input of the projections), ``active`` (one bit a row), ``gate`` and ``h`` (see
``probes.Seen``). A state file says how many bytes of each are complete; after a kill the next run
cuts the rest off and goes on behind it. Memory is one chunk of one layer, whatever the number of
tokens. Deja Vu and LLM in a flash (section 3.1) train their predictors on such recordings.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import mlx.core as mx
import numpy as np

from mlx_flash.common.files import atomic_write, beside, replacing, sync
from mlx_flash.common.json_reader import read_json
from mlx_flash.common.work_directory import WorkDirectory
from mlx_flash.errors import CalibrationError, FlashWarning
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.activations import Activation
from mlx_flash.models.dtypes import BIT_VIEWS

from .probes import Seen

MARKER = "calibration.key"
STATE = "recorded.json"
SQUARES = "up_squares"  # what is recorded of up's output: only the sum of its squares
# Part of the text -> what is recorded there: "x", "active", "h", "gate" or ``SQUARES``.
Records = Mapping[str, Sequence[str]]


def path_for(directory: ModelDirectory) -> Path:
    """Where the calibration of a model directory keeps its state."""
    return beside(directory.path.absolute(), ".calibrating")


def _work(path: Path) -> WorkDirectory:
    note = "; calibration keeps its state there"
    return WorkDirectory(path, MARKER, "calibration", CalibrationError, note)


def working_directory(path: Path, key: str) -> AbstractContextManager[Path]:
    """``path`` for this process alone, with what an interrupted run left.

    Args:
        path: from ``path_for``.
        key: of this calibration; what one with other settings left is removed.

    Raises CalibrationError, see ``WorkDirectory.claim``.
    """
    return _work(path).claim(key)


def remove(path: Path) -> None:
    """Remove a working directory when all is done."""
    _work(path).remove()


def disk_bytes(directory: ModelDirectory, records: Records, tokens: dict[str, int]) -> int:
    """Bytes that recording takes on disk.

    Args:
        tokens: part of the text -> its number of tokens.
    """
    item = directory.dtype.size
    total = 0
    for layer in directory.rows.layers:
        sizes = {
            "x": directory.d_model * item,
            "active": -(-layer.rows // 8),
            "h": layer.rows * item,
            "gate": layer.rows * item,
            SQUARES: 0,
        }
        for name, kinds in records.items():
            total += tokens[name] * sum(sizes[what] for what in kinds)
    return total


def check_disk(path: Path, needed: int) -> None:
    """Raise CalibrationError unless there is room for what is not written yet of ``needed``."""
    _work(path).check_disk(needed, "calibrate on fewer --tokens")


class Recorder:
    """A watcher that writes what it sees, sequence by sequence.

    Args:
        path: working directory.
        records: what to record of each part of the text.
        layers: how many.
        up_function: what the FFN applies to up's output before the product.
    """

    def __init__(self, path: Path, records: Records, layers: int, up_function: Activation) -> None:
        self.path, self.records = path, records
        self._up_function = up_function
        self.part: str | None = None
        self.done = 0
        self.losses: dict[str, float] = {"validation": 0.0, "held_out": 0.0}
        self.squares = [np.zeros(0)] * layers
        self.counts = [0] * layers
        self._layers = layers
        self._written: set[Path] = set()  # since the last commit
        self._restore()

    def __call__(self, seen: Seen) -> mx.array:
        """Record one layer's chunk; evaluates it."""
        kinds = self.records.get(self.part or "", ())
        if not kinds:
            return seen.h
        finite = mx.isfinite(seen.h).all() & mx.isfinite(seen.x).all()
        mx.eval(seen.x, seen.gate, seen.h, finite)
        if not finite.item():
            raise CalibrationError(
                f"layer {seen.layer} gives infinities or NaN on the calibration text: its weights "
                "are damaged or its float type is too narrow; nothing was written; convert the "
                "model again, with another --dtype"
            )
        if SQUARES in kinds and seen.up is not None:
            self._add_squares(seen)
        for what in kinds:
            if what == SQUARES:
                continue
            file = self.path / file_name(seen.layer, self.part, what)
            with open(file, "ab") as f:
                f.write(_raw(seen, what).data)
            self._written.add(file)
        return seen.h

    def _add_squares(self, seen: Seen) -> None:
        up = self._up_function(seen.up).astype(mx.float32).reshape(-1, seen.up.shape[-1])
        total = np.array(mx.square(up).sum(axis=0), np.float64)
        before = self.squares[seen.layer]
        self.squares[seen.layer] = total if not before.size else before + total
        self.counts[seen.layer] += up.shape[0]

    def mean_squares(self) -> list[np.ndarray | None]:
        """Mean square of up's output of each layer [rows], where it was recorded."""
        pairs = zip(self.squares, self.counts, strict=True)
        return [total / count if count else None for total, count in pairs]

    def commit(self) -> None:
        """Remember that one more sequence was seen whole.

        Its data reach the disk before the state file names them.
        """
        for file in sorted(self._written):
            sync(file)
        self._written.clear()
        sync(self.path)
        self.done += 1
        sizes = {file.name: file.stat().st_size for file in self.path.glob("layer-*.bits")}
        state = {"done": self.done, "sizes": sizes, "losses": self.losses, "counts": self.counts}
        if any(self.counts):
            # Two names in turn, so that the one the state names is whole at any time.
            state["squares"] = f"squares-{self.done % 2}.npz"
            save_arrays(self.path / state["squares"], *self.squares)
        atomic_write(self.path / STATE, json.dumps(state))

    def _restore(self) -> None:
        """Go on where the state file says; from the beginning where files do not bear it out."""
        sizes: dict[Path, int] = {}
        if (self.path / STATE).is_file():
            try:
                sizes = self._adopt(read_json(self.path / STATE))
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                message = (
                    f"what was recorded in {self.path} is damaged ({error}); it is recorded again"
                )
                warnings.warn(FlashWarning(message), stacklevel=3)
        if not self.done:
            _work(self.path).empty()
        for file in self.path.glob("layer-*.bits"):
            if file in sizes:
                os.truncate(file, sizes[file])
            else:
                file.unlink()

    def _adopt(self, state: dict[str, Any]) -> dict[Path, int]:
        """Take over what a state file says; returns the size of each file that it names.

        Raises ValueError, LookupError, TypeError or AttributeError where files or fields are not
        what they should be.
        """
        sizes = {self.path / str(name): int(size) for name, size in state["sizes"].items()}
        for file, size in sizes.items():
            found = file.stat().st_size if file.is_file() else 0
            if found < size:
                raise ValueError(f"{file.name} has {found} bytes of {size}")
        squares = self.squares
        if name := state.get("squares"):
            saved = load_arrays(self.path / name)
            if saved is None:
                raise ValueError(f"{name} is missing or cut off")
            squares = [saved[f"arr_{i}"] for i in range(self._layers)]
        done, counts = int(state["done"]), [int(count) for count in state["counts"]]
        losses = {str(part): float(loss) for part, loss in state["losses"].items()}
        if len(counts) != self._layers or losses.keys() != self.losses.keys():
            raise ValueError(f"{STATE} is of another version")
        self.done, self.losses, self.squares, self.counts = done, losses, squares, counts
        return sizes


def file_name(layer: int, part: str | None, what: str) -> str:
    """Name of a file in the working directory."""
    return f"layer-{layer:03d}.{part}.{what}.bits"


def _raw(seen: Seen, what: str) -> np.ndarray:
    if what == "active":
        active = np.array(seen.h != 0).reshape(-1, seen.h.shape[-1])
        return np.ascontiguousarray(np.packbits(active, axis=-1))
    array = getattr(seen, what)
    bits = mx.contiguous(array).view(BIT_VIEWS[array.dtype.size])
    return np.ascontiguousarray(np.array(bits))


@dataclass
class Part:
    """What was recorded of one layer and one part of the text; arrays are read when asked for.

    Args:
        path: working directory.
        layer, part: which.
        rows, d_model: of the layer.
        dtype: the model's float type.
    """

    path: Path
    layer: int
    part: str
    rows: int
    d_model: int
    dtype: mx.Dtype

    @property
    def tokens(self) -> int:
        """How many were recorded."""
        what, width = ("x", self.d_model) if self._file("x").is_file() else ("h", self.rows)
        return self._file(what).stat().st_size // (width * self.dtype.size)

    def floats(self, what: str, index: Any = slice(None)) -> mx.array:
        """x [n, d_model], h or gate [n, rows] of some tokens, in the model's float type."""
        width = self.d_model if what == "x" else self.rows
        unit = {2: np.uint16, 4: np.uint32}[self.dtype.size]
        bits = self._open(what, unit, width)[index]
        return mx.array(np.ascontiguousarray(bits)).view(self.dtype)

    def active(self, index: Any = slice(None)) -> np.ndarray:
        """Which rows were active, bool [n, rows]."""
        bits = self._open("active", np.uint8, -(-self.rows // 8))[index]
        return np.unpackbits(bits, axis=-1, count=self.rows).astype(bool)

    def _file(self, what: str) -> Path:
        return self.path / file_name(self.layer, self.part, what)

    def _open(self, what: str, unit: Any, width: int) -> np.ndarray:
        return np.memmap(self._file(what), unit, "r").reshape(-1, width)


def save_layer(path: Path, name: str, figures: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Keep a fitted layer: figures as JSON, arrays as float32; whole or not there."""
    save_arrays(path / f"fitted-{name}.npz", figures=np.array(json.dumps(figures)), **arrays)


def load_layer(path: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What ``save_layer`` kept; None where it is missing or damaged."""
    arrays = load_arrays(path / f"fitted-{name}.npz")
    if arrays is None or "figures" not in arrays:
        return None
    return json.loads(str(arrays.pop("figures"))), arrays


def save_arrays(file: Path, *numbered: np.ndarray, **arrays: np.ndarray) -> None:
    """Write an .npz file, whole or not at all; ``numbered`` are called arr_0, arr_1, ..."""
    with replacing(file) as temporary:
        np.savez(temporary, *numbered, **arrays)


def load_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """All arrays of an .npz file; None where it is missing or damaged."""
    try:
        with np.load(file) as saved:
            return {name: saved[name] for name in saved.files}
    except (OSError, ValueError, EOFError, RuntimeError, struct.error, BadZipFile):
        return None

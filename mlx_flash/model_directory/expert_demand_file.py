"""``experts.json``: what ``calibrate`` found each layer of a mixture to be asked for.

For every layer the misses per token with 0, 1, ... experts in memory, and whether sharing slots out
by them did better on other text than equal shares. The file is whole or not there; it names the row
file that it belongs to and carries a hash of itself.

Knows: the file's fields. Does not know: how they are measured, or what is planned from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_flash.common import json_reader
from mlx_flash.common.files import atomic_write, sha256_of_json
from mlx_flash.common.json_reader import entry, items, number, read_json, show, text, truth, whole
from mlx_flash.errors import DamagedError, PredictorError

from .directory import ModelDirectory

NAME = "experts.json"
FORMAT = "mlx_flash.experts"
FORMAT_VERSION = 1
FIGURES = {"text": text, "tokens": whole, "gain": number}  # of what is measured, shown to people


@dataclass(frozen=True)
class ExpertDemand:
    """A file's contents.

    Args:
        rows_fingerprint: of the row file that it was measured on.
        used: whether slots are shared out by the curves; else equally.
        curves: of each layer, misses per token with 0, 1, ... slots.
        measured: figures of the calibration.
    """

    rows_fingerprint: str
    used: bool
    curves: tuple[tuple[float, ...], ...]
    measured: dict[str, Any] = field(default_factory=dict)


def write(path: Path, demand: ExpertDemand) -> None:
    """Write ``path``, whole or not at all."""
    fields = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rows_fingerprint": demand.rows_fingerprint,
        "used": demand.used,
        "measured": demand.measured,
        "misses": demand.curves,
    }
    atomic_write(path, json.dumps({"sha256": sha256_of_json(fields)} | fields) + "\n")


def read(path: Path, fingerprint: str, rows: Sequence[int]) -> ExpertDemand | None:
    """What is in a file; None where there is none.

    Args:
        fingerprint: of the model's row file.
        rows: experts of each layer.

    Raises:
        PredictorError: another format, or measured on another model.
        DamagedError: it is not what was written.
    """
    if not path.exists():
        return None
    fields = _fields(path)
    if (rows_of := fields.get("rows_fingerprint")) != fingerprint:
        raise PredictorError(
            f"{path} was measured on another model or another conversion of it (rows "
            f"{str(rows_of)[:12]}, this model's are {fingerprint[:12]}); "
            "calibrate again, or remove it for equal shares"
        )
    try:
        curves = tuple(
            tuple(number(n, "a number of misses") for n in items(curve, "a layer's misses"))
            for curve in items(entry(fields, "misses"), "misses")
        )
        used = truth(entry(fields, "used"), "used")
        measured = json_reader.fields(entry(fields, "measured"), "measured")
        for name, check in FIGURES.items():
            if name in measured:
                check(measured[name], name)
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}; calibrate again") from error
    if [len(curve) for curve in curves] != [n + 1 for n in rows]:
        raise PredictorError(
            f"{path} has figures for {[len(c) - 1 for c in curves]} experts of the layers, the "
            f"model has {list(rows)}; calibrate again"
        )
    return ExpertDemand(fingerprint, used, curves, measured)


def curves_of(directory: ModelDirectory) -> tuple[tuple[float, ...], ...] | None:
    """The curves by which a directory's slots are shared out; None for equal shares."""
    found = read_for(directory)
    return found.curves if found and found.used else None


def read_for(directory: ModelDirectory) -> ExpertDemand | None:
    """``read`` for a mixture's directory; None for other models."""
    if directory.mixture is None:
        return None
    rows = [layer.rows for layer in directory.rows.layers]
    return read(directory.path / NAME, directory.rows.fingerprint, rows)


def verify(path: Path) -> None:
    """Raise DamagedError where a file is not what was written."""
    _fields(path)


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json_reader.fields(read_json(path, finite=True), "it")
        found = entry(fields, "sha256")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {error}; calibrate again") from error
    del fields["sha256"]
    if fields.get("format") != FORMAT:
        raise PredictorError(f"{path} was not written by mlx_flash; move it, or calibrate again")
    if fields.get("format_version") != FORMAT_VERSION:
        raise PredictorError(
            f"{path} has format version {fields.get('format_version')}, this version of mlx_flash "
            f"reads {FORMAT_VERSION}; update mlx_flash or calibrate again"
        )
    if sha256_of_json(fields) != found:
        raise DamagedError(f"{path} is damaged: its hash is not {show(found)}; calibrate again")
    return fields

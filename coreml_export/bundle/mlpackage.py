"""A MIL program as an .mlpackage, the same bytes for the same program.

coremltools draws a new identifier for every Manifest.json and serialises the spec in no fixed
order; both are written here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreml_export.errors import ExportError
from coreml_export.program.coremltools_compat import ct, to_spec

SPEC = "com.apple.CoreML/model.mlmodel"
WEIGHTS = "com.apple.CoreML/weights"
FULL = 1 << 20  # bytes free, below which a failed write is put down to a full disk
AUTHOR = "com.apple.CoreML"


def build(program: Any, path: Path, metadata: Mapping[str, str], target: str = "iOS18") -> None:
    """Write a MIL program as a package.

    Args:
        path: package directory to make.
        metadata: what the package says of itself.
        target: least system, a key of ``coremltools_compat.TARGETS``.

    Raises:
        ExportError: coremltools refuses the program, or the disk is full.
    """
    weights = path / "Data" / WEIGHTS
    weights.mkdir(parents=True)
    spec = _convert(program, weights, target)
    for key, value in sorted(metadata.items()):
        spec.description.metadata.userDefined[key] = value
    (path / "Data" / SPEC).write_bytes(spec.SerializeToString(deterministic=True))
    write_manifest(path)


def _convert(program: Any, weights: Path, target: str) -> Any:
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its bars
            warnings.simplefilter("ignore")
            return to_spec(program, weights, target)
    except (ValueError, TypeError, RuntimeError) as error:
        if shutil.disk_usage(weights).free < FULL:  # the writer says "unknown error"
            raise ExportError(
                f"the disk of {weights} is full; make room, or export elsewhere"
            ) from error
        raise ExportError(f"coremltools cannot convert this for {target}: {error}") from error
    finally:
        log.setLevel(level)


def write_manifest(path: Path) -> None:
    """Write a package's Manifest.json, its identifiers derived from the contents."""
    spec = (path / "Data" / SPEC).read_bytes()
    entries = {}
    root = ""
    for name, item in (("Specification", SPEC), ("Weights", WEIGHTS)):
        digest = hashlib.sha256(name.encode() + spec).digest()[:16]
        identifier = str(uuid.UUID(bytes=digest, version=4)).upper()
        entries[identifier] = {
            "author": AUTHOR,
            "description": f"CoreML Model {name}",
            "name": Path(item).name,
            "path": item,
        }
        if name == "Specification":
            root = identifier
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": dict(sorted(entries.items())),
        "rootModelIdentifier": root,
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")


def load(path: Path) -> Any:
    """A package as coremltools reads it, not compiled.

    Raises:
        ExportError: it is not a package, or damaged.
    """
    try:
        return ct.models.MLModel(str(path), skip_model_load=True)
    except Exception as error:  # protobuf's, the C++ reader's: all mean that it cannot be read
        raise ExportError(f"{path} cannot be read as a Core ML package: {error}") from error

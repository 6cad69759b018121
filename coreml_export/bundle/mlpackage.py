"""A MIL program as an .mlpackage, the same bytes for the same program.

coremltools draws a new identifier for every Manifest.json and serialises the spec in no fixed
order; both are written here.

Knows: the package's files. Does not know: what the program computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreml_export.errors import ExportError
from coreml_export.program.coremltools_compat import TARGETS, ct

SPEC = "com.apple.CoreML/model.mlmodel"
WEIGHTS = "com.apple.CoreML/weights"
FULL = 1 << 20  # bytes free below which a write that failed is put down to the disk
AUTHOR = "com.apple.CoreML"


def convert(program: Any, metadata: Mapping[str, str], target: str = "iOS18") -> Any:
    """A MIL program as a model; nothing of it is optimised away or cast on the way.

    Raises:
        ExportError: coremltools refuses it.
    """
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its bars
            warnings.simplefilter("ignore")
            model = ct.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=TARGETS[target],
                compute_precision=ct.precision.FLOAT32,  # no casts of its own: all is fp16 already
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
            )
    except (ValueError, TypeError, RuntimeError) as error:
        if shutil.disk_usage(tempfile.gettempdir()).free < FULL:  # the writer says "unknown error"
            raise ExportError(
                f"the disk of {tempfile.gettempdir()} is full; make room, or export elsewhere"
            ) from error
        raise ExportError(f"coremltools cannot convert this for {target}: {error}") from error
    finally:
        log.setLevel(level)
    model.user_defined_metadata.pop("com.github.apple.coremltools.conversion_date", None)
    for key, value in sorted(metadata.items()):
        model.user_defined_metadata[key] = value
    return model


def save(model: Any, path: Path) -> None:
    """Write a converted model as a package directory that is not there yet."""
    data = path / "Data"
    (data / SPEC).parent.mkdir(parents=True)
    (data / SPEC).write_bytes(model.get_spec().SerializeToString(deterministic=True))
    weights = Path(model.weights_dir) if model.weights_dir else None
    if weights and weights.is_dir():
        try:
            weights.rename(data / WEIGHTS)
            (data / WEIGHTS).chmod((data / WEIGHTS).parent.stat().st_mode)  # was for us alone
        except OSError:  # another file system
            shutil.copytree(weights, data / WEIGHTS)
    (data / WEIGHTS).mkdir(exist_ok=True)
    write_manifest(path)


def write_manifest(path: Path) -> None:
    """The package's Manifest.json, its identifiers drawn from the contents."""
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


def build(program: Any, path: Path, metadata: Mapping[str, str], target: str = "iOS18") -> None:
    """Convert a program and write its package; coremltools' own copy of the weights goes."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=path.parent) as scratch:
        tempfile.tempdir = (
            scratch  # coremltools keeps weights there; a move within one disk is free
        )
        try:
            model = convert(program, metadata, target)
            save(model, path)
        finally:
            tempfile.tempdir = before
        del model


def load(path: Path) -> Any:
    """A package as coremltools reads it, not compiled.

    Raises:
        ExportError: it is none, or damaged.
    """
    try:
        return ct.models.MLModel(str(path), skip_model_load=True)
    except Exception as error:  # protobuf's, the C++ reader's: all mean that it cannot be read
        raise ExportError(f"{path} cannot be read as a Core ML package: {error}") from error

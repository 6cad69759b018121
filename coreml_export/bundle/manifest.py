"""``manifest.json``: what an app has to know of an export, and by what it is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coreml_export.errors import ExportError
from coreml_export.settings import PROFILES, Settings
from mlx_flash.common.files import sha256_of
from mlx_flash.common.json_reader import (
    entry,
    fields,
    plain_name,
    read_json,
    show,
    text,
    whole,
)
from mlx_flash.errors import DamagedError

from .mlpackage import SPEC

NAME = "manifest.json"
FORMAT = "coreml_export"
FORMAT_VERSION = 1
MARKER = "export.key"  # in OUT.partial: it was made by an export
UNHASHED = (NAME, MARKER, "parity.json", "parity.md", "README.md")
KINDS = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8"}


def functions(package: Path) -> dict[str, Any]:
    """Inputs, outputs and states of a package's functions, from its spec alone."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((package / "Data" / SPEC).read_bytes())
    found = {}
    for function in spec.description.functions:
        entry: dict[str, Any] = {"inputs": {}, "outputs": {}, "states": {}}
        for kind, features in (("inputs", function.input), ("outputs", function.output)):
            for feature in features:
                entry[kind][feature.name] = _array(feature.type.multiArrayType)
        for feature in function.state:
            entry["states"][feature.name] = _array(feature.type.stateType.arrayType)
        shapes = _shapes(spec.mlProgram.functions[function.name])
        for name, output in entry["outputs"].items():  # descriptions lack some of these
            output["shape"] = shapes[name]
        found[function.name] = entry
    return found


def _shapes(function: Any) -> dict[str, list[int]]:
    """Shape of every tensor of a function."""
    found = {}
    for block in function.block_specializations.values():
        for operation in block.operations:
            for output in operation.outputs:
                dimensions = output.type.tensorType.dimensions
                found[output.name] = [int(d.constant.size) for d in dimensions]
    return found


def _array(kind: Any) -> dict[str, Any]:
    return {"dtype": KINDS.get(kind.dataType, str(kind.dataType)), "shape": list(kind.shape)}


def file_entries(out: Path, without: str = "") -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file of an export but manifest, report and README.

    Args:
        without: a directory to leave out.
    """
    entries = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        left_out = bool(without) and name.split("/")[0] == without
        if file.is_file() and name not in UNHASHED and not left_out:
            entries[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return entries


def write(out: Path, content: dict[str, Any], without: str = "") -> None:
    """Write the manifest with the hashes of all files.

    Args:
        without: a directory of the export that is removed before it is done.
    """
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    content["files"] = file_entries(out, without)
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    (out / NAME).write_text(text + "\n", encoding="utf-8")


def read(out: Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        ExportError: it cannot be read, or is of another format or version.
    """
    try:
        found = read_json(out / NAME, finite=True)
    except (OSError, ValueError) as error:
        raise ExportError(f"{out} is not an export, its {NAME} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ExportError(f"{out / NAME} is not a manifest of coreml_export")
    if found.get("format_version") != FORMAT_VERSION:
        raise ExportError(
            f"{out} has format version {show(found.get('format_version'))}, this version reads "
            f"{FORMAT_VERSION}; export the model again"
        )
    _check_files(out, found.get("files"))
    return found


def _check_files(out: Path, files: Any) -> None:
    """Raise ExportError unless a manifest lists files of its own directory, with their sizes."""
    try:
        for name, said in fields(files, "files").items():
            for part in name.split("/"):
                plain_name(part, "a name in files")
            whole(entry(fields(said, name), "bytes", name), f"bytes of {name}")
            text(entry(said, "sha256", name), f"sha256 of {name}")
    except ValueError as error:
        raise ExportError(f"{out / NAME} is damaged: {error}; export the model again") from error


def settings_of(content: dict[str, Any]) -> Settings:
    """The settings that an export was made with, as far as its contents depend on them.

    Raises:
        ExportError: the manifest lacks one, or has one that this version does not know.
    """
    try:
        return Settings(
            profiles=tuple(profile for profile in PROFILES if profile in content),
            quant=content["quantisation"],
            recipe=[(pattern, scheme) for pattern, scheme in content["recipe"]],
            precision=content["precision"],
            context=content["context"],
            target=content["target"],
            units=content["units"],
            rounding=content["rounding"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{NAME} of this export lacks a setting: {error!r}") from error


def verify(out: Path, content: dict[str, Any]) -> None:
    """Hash every file again.

    Raises:
        DamagedError: a file is missing or was changed.
    """
    for name, expected in content["files"].items():
        file = out / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing; copy the export again")
        if file.stat().st_size != expected["bytes"]:
            raise DamagedError(
                f"{file} has {file.stat().st_size} bytes, expected {expected['bytes']}; "
                "copy the export again"
            )
        if sha256_of(file) != expected["sha256"]:
            raise DamagedError(f"{file} is damaged, its sha256 differs; copy the export again")

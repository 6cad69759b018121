"""The safetensors files of a Hugging Face directory: which they are, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mlx_flash.errors import DamagedError, ModelError
from mlx_flash.storage.safetensors_header import data_end, read_entries


def find_files(path: Path) -> tuple[list[Path], str]:
    """A checkpoint's weight files, and a fingerprint of them and of config.json.

    Raises:
        ModelError: there are none, some are missing, or one cannot be opened.
        DamagedError: one is shorter than its header says.
    """
    try:
        files = _weight_files(path)
        for file in files:
            _check_complete(file)
        return files, _fingerprint(path, files)
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [path / name for name in sorted(set(names))]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error!r}") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"{path} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}; "
                "download them again"
            )
    else:
        files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelError(
            f"{path} has no model*.safetensors; other weight formats are not read, "
            "save the checkpoint as safetensors first"
        )
    return files


def _check_complete(file: Path) -> None:
    found = file.stat().st_size
    try:
        expected = data_end(*read_entries(file))
    except ValueError as error:
        raise DamagedError(
            f"{file} is truncated or not a safetensors file: {error}; download it again"
        ) from error
    if expected > found:
        raise DamagedError(
            f"{file} is truncated: {found} bytes found, {expected} expected; download it again"
        )


def _fingerprint(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]

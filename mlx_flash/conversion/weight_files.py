"""The safetensors files of a Hugging Face directory: which they are, and whether they are whole."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mlx_flash.common.json_reader import entry, fields, plain_name, read_json
from mlx_flash.errors import DamagedError, ModelError
from mlx_flash.storage.safetensors_header import data_end, read_entries


def find_files(path: Path) -> tuple[list[Path], str, dict[str, Any]]:
    """A checkpoint's weight files, a fingerprint of them and of config.json, and its tensors.

    The tensors are by name: dtype and shape as the headers have them.

    Raises:
        ModelError: there are none, some are missing, or one cannot be opened.
        DamagedError: one is not as long as its header says, breaks another rule of the format, or
            two of them have the same tensor.
    """
    try:
        files = _weight_files(path)
        tensors: dict[str, Any] = {}
        for file in files:
            entries = _entries(file)
            if twice := sorted(entries.keys() & tensors.keys()):
                raise DamagedError(
                    f"tensor {twice[0]!r:.80} is in {file} and in another weight file, too; "
                    "expected each tensor once: move away the file that is left over"
                )
            tensors |= entries
        return files, _fingerprint(path, files), tensors
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            content = fields(read_json(index), "it")
            where = fields(entry(content, "weight_map"), "weight_map")
            names = {plain_name(name, f"the shard of {key!r:.80}") for key, name in where.items()}
        except ValueError as error:
            raise ModelError(f"{index} is not a safetensors index: {error}") from error
        files = [path / name for name in sorted(names)]
        single = path / "model.safetensors"
        if single.is_file() and single not in files:
            if any(file.is_file() for file in files):
                raise ModelError(
                    f"{path} has {single.name} and an index of other files ({index.name}); it is "
                    "not clear which of them are the model; move the others away"
                )
            return [single]  # the index is left over from another download
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"{path} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:20])}; "
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


def _entries(file: Path) -> dict[str, Any]:
    """A file's tensors by name; DamagedError unless it keeps the rules of its format."""
    if not file.is_file():
        raise ModelError(f"{file} is no plain file; expected a safetensors file")
    found = file.stat().st_size
    try:
        entries, start = read_entries(file)
    except ValueError as error:
        raise DamagedError(
            f"{file} is truncated or not a safetensors file: {error}; download it again"
        ) from error
    if (expected := data_end(entries, start)) != found:
        wrong = "truncated" if expected > found else "longer than its tensors"
        raise DamagedError(
            f"{file} is {wrong}: {found} bytes found, {expected} expected; download it again"
        )
    return entries


def _fingerprint(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]

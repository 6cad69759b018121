"""A model directory: its config, its row file, and whether they belong together.

Knows: file names, the config's ``flash`` object, hashes. Does not know: MLX, mlx-lm, how weights
are used. Opening reads headers only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import families
from .errors import DamagedError, FlashError, ModelError, RowFileError
from .families import Ffn
from .rows import RowFile, sha256_of

FORMAT_VERSION = 1
ROW_FILE = "ffn_rows.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory as a dict; ModelError where there is none that can be read."""
    if not path.is_dir():
        raise ModelError(f"no such model directory: {path}")
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} has no config.json; expected a Hugging Face model directory")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, expected a JSON object")
    return config


class ModelDirectory:
    """An existing model directory, opened and checked from its headers.

    Raises:
        ModelError: missing, not converted, of a later format, or of an unknown family.
        RowFileError: the row file is foreign or belongs to another model.
        DamagedError: a file is shorter than it should be.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        flash = self.config.get("flash")
        if not isinstance(flash, dict):
            raise ModelError(
                f"{self.path} is not an mlx_flash model directory (no 'flash' in config.json); "
                f"make one with: mlx_flash convert --model {self.path} --mlx-path OUT"
            )
        if flash.get("format_version") != FORMAT_VERSION:
            raise ModelError(
                f"{self.path} has format version {flash.get('format_version')!r}, this version of "
                f"mlx_flash reads {FORMAT_VERSION}; update mlx_flash or convert the model again"
            )
        self.ffn: Ffn = families.find(self.config)
        self.files: dict[str, dict[str, Any]] = flash.get("files", {})
        self.rows = RowFile(self.path / flash.get("row_file", ROW_FILE))
        if self.rows.fingerprint != flash.get("rows_fingerprint"):
            raise RowFileError(
                f"{self.rows.path} belongs to another model than {self.path / 'config.json'}; "
                "put the row file that was converted with it back, or convert the model again"
            )
        for name, entry in self.files.items():
            self._check_size(name, entry["bytes"])

    @property
    def shards(self) -> list[Path]:
        """Files of the resident weights."""
        return sorted(self.path.glob("model*.safetensors"))

    def verify(self, progress: Callable[[int], Any] | None = None) -> Iterator[FlashError]:
        """Hash everything again; yields one error for each layer or file that is damaged."""
        for layer in range(len(self.rows.layers)):
            try:
                self.rows.verify(layer, progress)
            except DamagedError as error:
                yield error
        for name, entry in self.files.items():
            found = sha256_of(self.path / name, progress)
            if found != entry["sha256"]:
                yield DamagedError(
                    f"{self.path / name} is damaged: sha256 {found}, expected {entry['sha256']}"
                )

    @property
    def verify_bytes(self) -> int:
        """How many bytes ``verify`` reads."""
        rows = sum(self.rows.layer_bytes(i) for i in range(len(self.rows.layers)))
        return rows + sum(entry["bytes"] for entry in self.files.values())

    def _check_size(self, name: str, expected: int) -> None:
        file = self.path / name
        if not file.is_file():
            raise ModelError(f"{file} is missing; copy it again or convert the model again")
        if (found := file.stat().st_size) != expected:
            raise DamagedError(
                f"{file} has {found} bytes, expected {expected}; "
                "copy it again or convert the model again"
            )

"""A model directory: its config, its row file, and whether they belong together.

Knows: file names, the config's ``flash`` object, hashes. Does not know: mlx-lm, how weights
are used. Opening reads headers only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_flash.common.files import sha256_of
from mlx_flash.common.json_reader import show
from mlx_flash.errors import DamagedError, FlashError, ModelError, ReadError, RowFileError
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.models.families import Ffn
from mlx_flash.models.plausible import check_sizes
from mlx_flash.models.positions import positions_of
from mlx_flash.models.quantized_rows import QuantScheme, scheme_from
from mlx_flash.storage.row_file import RowFile
from mlx_flash.storage.safetensors_header import header

from .config import FORMAT_VERSION, config_sha256, locate_ffn, read_config
from .flash_object import check_flash, check_quantization, listed_files
from .links import check_link


class ModelDirectory:
    """An existing model directory, opened and checked from its headers.

    Raises:
        ModelError: no such directory, not converted, of a later format, or of an unknown family.
        RowFileError: the row file is foreign or belongs to another model.
        DamagedError: a file is missing or has another size than it was written with.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()  # it stays there, wherever the process goes
        self.config = read_config(self.path)
        flash = self.config.get("flash")
        if not isinstance(flash, dict):
            raise ModelError(
                f"{self.path} is not an mlx_flash model directory (no 'flash' in config.json); "
                f"make one with: mlx_flash convert --model {self.path} --mlx-path OUT"
            )
        if flash.get("format_version") != FORMAT_VERSION:
            raise ModelError(
                f"{self.path} has format version {show(flash.get('format_version'))}, this version "
                f"of mlx_flash reads {FORMAT_VERSION}; update mlx_flash or convert the model again"
            )
        self._ffn, self.mixture = locate_ffn(self.config, self.path)
        try:
            check_flash(flash)
            check_quantization(self.config)
            self.files = listed_files(flash)
            row_file = self.path / flash["row_file"]
            fingerprint, layouts = flash["rows_fingerprint"], flash["layouts"]
            self.unit: str = flash["unit"]
            self.dtype = DTYPES[flash["dtype"]]
            quantisation = flash["quantization"]
            self.scheme: QuantScheme | None = scheme_from(quantisation) if quantisation else None
            self._config_sha256: str = flash["config_sha256"]
        except (KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
            raise ModelError(
                f"the flash object in {self.path / 'config.json'} lacks a key, or one has another "
                f"type than expected ({error}); convert the model again"
            ) from error
        self.rows = self._open_rows(row_file, fingerprint, layouts)
        for name, entry in self.files.items():
            self._check_size(name, entry["bytes"])
        if strange := [file.name for file in self.shards if file.name not in self.files]:
            raise ModelError(
                f"{self.path} holds weights that were not written by its conversion and would be "
                f"loaded with it: {', '.join(strange)}; move them away"
            )
        self._check_sizes()

    @property
    def ffn(self) -> Ffn:
        """Where the FFN of a dense model is, and what it computes.

        Raises:
            ModelError: the model is a mixture.
        """
        if self._ffn is None:
            raise ModelError(f"{self.path} is a mixture of experts; it has no FFN of neurons")
        return self._ffn

    @property
    def d_model(self) -> int:
        """Width of the hidden state."""
        parts = {part.name: part for part in self.rows.layout.parts}
        if self.unit == "neuron":
            width = parts["down"].width
            return width * 32 // self.scheme.bits if self.scheme else width
        return parts[f"{self._down}.weight"].shape[0]

    @property
    def d_ffn(self) -> int:
        """Neurons of the widest layer, or of an expert."""
        if self.unit == "neuron":
            return max(layer.rows for layer in self.rows.layers)
        up = self.mixture.projections[0] if self.mixture else self.ffn.fused or self.ffn.up
        sizes = [
            part.shape[0]
            for layout in self.rows.layouts
            for part in layout.parts
            if part.name == f"{up}.weight"
        ]
        return max(sizes)

    @property
    def _down(self) -> str:
        return self.mixture.projections[-1] if self.mixture else self.ffn.down

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for; None where its config does not say."""
        return positions_of(self.config)

    @property
    def shards(self) -> list[Path]:
        """Files of the resident weights."""
        return sorted(self.path.glob("model*.safetensors"))

    def verify(self, progress: Callable[[int], Any] | None = None) -> Iterator[FlashError]:
        """Hash everything again; yields one error for each layer or file that is damaged."""
        if config_sha256(self.config) != self._config_sha256:
            yield DamagedError(
                f"{self.path / 'config.json'} was changed since it was written; "
                "copy it again or convert the model again"
            )
        for layer in range(len(self.rows.layers)):
            try:
                self.rows.verify(layer, progress)
            except (DamagedError, ReadError) as error:
                yield error
        for name, entry in self.files.items():
            try:
                found = sha256_of(self.path / name, progress)
            except OSError as error:
                yield ReadError(error.errno, f"reading {self.path / name}: {error.strerror}")
                continue
            if found != entry["sha256"]:
                yield DamagedError(
                    f"{self.path / name} is damaged: sha256 {found}, expected {entry['sha256']}; "
                    "copy it again or convert the model again"
                )

    @property
    def verify_bytes(self) -> int:
        """How many bytes ``verify`` reads."""
        rows = sum(self.rows.layer_bytes(i) for i in range(len(self.rows.layers)))
        return rows + sum(entry["bytes"] for entry in self.files.values())

    def _open_rows(self, file: Path, fingerprint: str, layouts: list[Any]) -> RowFile:
        self._check_there(file)
        rows = RowFile(file)
        if rows.fingerprint != fingerprint:
            raise RowFileError(
                f"{file} belongs to another model than {self.path / 'config.json'}; "
                "put the row file that was converted with it back, or convert the model again"
            )
        found = json.loads(json.dumps([layout.to_json() for layout in rows.layouts]))
        if found != layouts or rows.unit != self.unit:
            raise DamagedError(
                f"the header of {file} is damaged: its row layout is not the one that "
                "config.json has; copy it again or convert the model again"
            )
        return rows

    def _check_sizes(self) -> None:
        """Hold the config's sizes against what the files hold: a model is made of it next."""
        shapes = [entry["shape"] for shard in self.shards for entry in header(shard)[0].values()]
        for layer in self.rows.layers:
            shapes += [(layer.rows, *part.shape) for part in layer.layout.parts]
        try:
            check_sizes(self.config, shapes)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}; or convert the model again") from error

    def _check_there(self, file: Path) -> None:
        if not file.is_file():
            raise DamagedError(f"{file} is missing; copy it again or convert the model again")

    def _check_size(self, name: str, expected: int) -> None:
        file = self.path / name
        self._check_there(file)
        check_link(file, self.path)
        if (found := file.stat().st_size) != expected:
            raise DamagedError(
                f"{file} has {found} bytes, expected {expected}; "
                "copy it again or convert the model again"
            )

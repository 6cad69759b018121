"""A checkpoint to convert: Hugging Face directories, hub names, and which file is a GGUF.

A checkpoint has ``config``, ``shapes`` and ``dtypes`` by mlx-lm's weight names, a ``fingerprint``,
``take(name)`` which reads one tensor, and ``write_tokenizer``. ``GGUFCheckpoint`` is the other one.

Knows: files of a checkpoint, mlx-lm's ``sanitize``. Does not know: rows, where they go.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import utils

from . import families
from .directory import read_config
from .errors import DamagedError, ModelError
from .gguf_source import GGUFCheckpoint

FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "LICENSE*", "NOTICE*")
NOT_SIDE_FILES = ("config.json", "*.index.json", "*.safetensors*")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Checkpoint(Protocol):
    """What conversion needs of a source."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, mx.Dtype]
    fingerprint: str

    def take(self, name: str) -> mx.array:
        """One tensor, evaluated; each name once."""

    def write_tokenizer(self, out: Path) -> None:
        """Put tokenizer files, licence and card into a directory."""


def open_checkpoint(source: str, dtype: str | None = None) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory or a hub name.

    Args:
        source: path or hub name ("org/name").
        dtype: float16, bfloat16 or float32 to cast floats to; None keeps the checkpoint's.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is a file but no .gguf; expected a GGUF file, a Hugging Face directory "
                "or a hub name"
            )
        return GGUFCheckpoint(path, dtype)
    if not path.exists():
        path = _download(source)
    return HFCheckpoint(path, dtype)


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise ModelError(
            f"no such model: {name!r} is neither a file, nor a directory, nor a hub name (org/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*utils.DEFAULT_ALLOW_PATTERNS, "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"no such model: {name!r} is not a directory here and could not be fetched from the "
            f"Hugging Face hub: {error}"
        ) from error


class HFCheckpoint:
    """A Hugging Face directory of safetensors, under mlx-lm's names after its ``sanitize``.

    Nothing is read until ``take``; the memory it needs is that of one tensor.
    """

    def __init__(self, path: Path, dtype: str | None = None) -> None:
        self.path = path
        self.config = utils._decode_tagged_floats(read_config(path))
        families.find(self.config)
        _refuse_quantised(self.config)
        self._dtype = FLOATS[dtype] if dtype else None
        files = _weight_files(path)
        self.fingerprint = _fingerprint(path, files)
        self._weights = _load_lazily(self.config, files)
        self.shapes = {name: tuple(w.shape) for name, w in self._weights.items()}
        self.dtypes = {name: self._target(name, w.dtype) for name, w in self._weights.items()}
        if dtype:
            self.config["torch_dtype"] = dtype

    def take(self, name: str) -> mx.array:
        weight = self._weights.pop(name).astype(self.dtypes[name])
        mx.eval(weight)
        return weight

    def write_tokenizer(self, out: Path) -> None:
        for pattern in SIDE_FILES:
            for file in sorted(self.path.glob(pattern)):
                if file.is_file() and not any(file.match(p) for p in NOT_SIDE_FILES):
                    shutil.copyfile(file, out / file.name)

    def _target(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        if dtype not in FLOATS.values():
            raise ModelError(
                f"tensor {name} is {dtype}; expected one of {', '.join(FLOATS)} "
                "(quantised checkpoints are not supported yet)"
            )
        return self._dtype or dtype


def _refuse_quantised(config: dict[str, Any]) -> None:
    for key in ("quantization", "quantization_config"):
        if config.get(key):
            raise ModelError(
                f"the checkpoint is quantised ({key} in config.json), which this version cannot "
                "page; use the float checkpoint, or a GGUF"
            )


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error!r}") from error
        files = [path / name for name in names]
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
    for file in files:
        _check_complete(file)
    return files


def _check_complete(file: Path) -> None:
    found = file.stat().st_size
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        try:
            if not 0 < size <= found - 8:
                raise ValueError(f"a header of {size} bytes in a file of {found}")
            header = json.loads(f.read(size))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{file} is truncated or no safetensors file: {error}") from error
    if (expected := 8 + size + max(ends, default=0)) > found:
        raise DamagedError(
            f"{file} is truncated: {found} bytes found, {expected} expected; download it again"
        )


def _fingerprint(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _load_lazily(config: dict[str, Any], files: list[Path]) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            weights.update(mx.load(str(file)))
        except RuntimeError as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    model_class, args_class = utils._get_classes(config)
    try:
        model = model_class(args_class.from_dict(config))
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ModelError(
            f"config.json of model_type {config['model_type']!r} makes no model: {error}"
        ) from error
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except (KeyError, ValueError) as error:
            raise ModelError(f"a tensor is missing or of the wrong shape: {error}") from error
    _compare(dict(tree_flatten(model.parameters())), weights)
    return weights


def _compare(expected: dict[str, mx.array], found: dict[str, mx.array]) -> None:
    """Raise a ModelError that lists tensors missing, extra and of the wrong shape."""
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"not expected: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape of {name}: {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:20])
        raise ModelError(f"the tensors do not fit config.json:{listed}{more}")

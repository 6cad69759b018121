"""A checkpoint to convert: Hugging Face directories, hub names, and which file is a GGUF.

A checkpoint has ``config``, ``shapes`` and ``dtypes`` by mlx-lm's weight names, a ``fingerprint``,
``predictors`` that ship with it, ``take(name)`` which reads one tensor, and ``write_tokenizer``.
``GGUFCheckpoint`` is the other one.

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
from mlx_lm.models.cache import make_prompt_cache

from .architectures import get_classes
from .directory import find_ffn, read_config
from .errors import DamagedError, ModelError
from .gguf_source import GGUFCheckpoint
from .shipped import shipped

FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "LICENSE*", "NOTICE*")
NOT_SIDE_FILES = ("config.json", "*.index.json", "*.safetensors*")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
LISTED = 20  # offenders named in a message


class Checkpoint(Protocol):
    """What conversion needs of a source."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, mx.Dtype]
    fingerprint: str
    predictors: dict[str, mx.array]

    def take(self, name: str) -> mx.array:
        """One tensor, evaluated; each name once."""

    def write_tokenizer(self, out: Path) -> None:
        """Put tokenizer files, licence and card into a directory."""


def open_checkpoint(
    source: str | Path, dtype: str | None = None, dequantize: bool = True
) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory or a hub name.

    Args:
        source: path or hub name ("org/name").
        dtype: float16, bfloat16 or float32 to cast floats to; None keeps the checkpoint's.
        dequantize: make floats of a GGUF file's quantised tensors.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    path = Path(source)
    try:
        is_file, exists = path.is_file(), path.exists()
    except OSError as error:
        raise ModelError(f"no such model: {source}: {error.strerror}") from error
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{path} is a file but no .gguf; expected a GGUF file, a Hugging Face directory "
                "or a hub name"
            )
        return GGUFCheckpoint(path, dtype, dequantize)
    if not exists:
        path = _download(str(source))
    return HFCheckpoint(path, dtype)


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name) or name.lower().endswith(".gguf"):
        raise ModelError(
            f"no such model: {name!r} is neither a file, nor a directory, nor a hub name (org/name)"
        )
    from huggingface_hub import snapshot_download

    patterns = [*utils.DEFAULT_ALLOW_PATTERNS, "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own, its HTTP library's, the disk's: all are no model
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
        self.config = read_config(path)
        _refuse_unfit(path, self.config)
        find_ffn(self.config, path)
        self._dtype = FLOATS[dtype] if dtype else None
        try:
            files = _weight_files(path)
            self.fingerprint = _fingerprint(path, files)
        except OSError as error:
            raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error
        self._weights, self.predictors = _load_lazily(path, self.config, files)
        self.shapes = {name: tuple(w.shape) for name, w in self._weights.items()}
        self.dtypes = {name: self._target(name, w.dtype) for name, w in self._weights.items()}
        if dtype:
            key = "dtype" if "dtype" in self.config else "torch_dtype"
            self.config[key] = dtype

    def take(self, name: str) -> mx.array:
        weight = self._weights.pop(name)
        cast = weight.astype(self.dtypes[name])
        try:
            mx.eval(cast)
        except RuntimeError as error:
            raise DamagedError(
                f"tensor {name} of {self.path} cannot be read: {error}; get the checkpoint again"
            ) from error
        narrowed = cast.dtype == mx.float16 and weight.dtype != mx.float16
        if narrowed and mx.any(mx.isinf(cast) & mx.isfinite(weight)).item():
            raise ModelError(
                f"tensor {name} has values that float16 cannot hold; "
                "choose --dtype bfloat16 or float32"
            )
        return cast

    def write_tokenizer(self, out: Path) -> None:
        for pattern in SIDE_FILES:
            for file in sorted(self.path.glob(pattern)):
                if file.is_file() and not any(file.match(p) for p in NOT_SIDE_FILES):
                    shutil.copyfile(file, out / file.name)

    def _target(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        if dtype not in FLOATS.values():
            raise ModelError(
                f"tensor {name} is {str(dtype).rpartition('.')[2]}; expected one of "
                f"{', '.join(FLOATS)} (quantised checkpoints are not supported yet)"
            )
        return self._dtype or dtype


def _refuse_unfit(path: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for what is no plain float checkpoint of mlx-lm's own classes."""
    if "flash" in config:
        raise ModelError(f"{path} is a model directory already; convert the checkpoint it is from")
    if config.get("model_file"):
        raise ModelError(
            f"{path} brings its own code ({config['model_file']}), which is not run; "
            "expected a model that mlx-lm has"
        )
    text = config.get("text_config")
    configs = [config, text if isinstance(text, dict) else {}]
    keys = ("quantization", "quantization_config")
    found = [f"{key} in config.json" for c in configs for key in keys if c.get(key)]
    if (path / "hf_quant_config.json").exists():
        found.append("hf_quant_config.json")
    if found:
        raise ModelError(
            f"{path} is quantised ({found[0]}), which this version cannot page; "
            "use the float checkpoint, or a GGUF"
        )


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
    for file in files:
        _check_complete(file)
    return files


def _check_complete(file: Path) -> None:
    found = file.stat().st_size
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        try:
            if not 0 < size <= min(found - 8, MAX_HEADER):
                raise ValueError(f"a header of {size} bytes in a file of {found}")
            header = json.loads(f.read(size))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            expected = 8 + size + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(
                f"{file} is truncated or no safetensors file: {error}; download it again"
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


def _load_lazily(
    path: Path, config: dict[str, Any], files: list[Path]
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Weights under mlx-lm's names, and the tensors of predictors under the checkpoint's."""
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            weights.update(mx.load(str(file)))
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    try:
        model_class, args_class = get_classes(config)
        model = model_class(args_class.from_dict(config))
        model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))  # built, not evaluated
    except Exception as error:  # the config drives foreign code, which may fail in any way
        raise ModelError(
            f"{path / 'config.json'} makes no {config['model_type']} model: "
            f"{type(error).__name__}: {error}"
        ) from error
    predictors = shipped(weights)
    if not model.layers:
        raise ModelError(f"{path / 'config.json'} makes a model without layers")
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except Exception as error:  # the same
            raise ModelError(
                f"the tensors of {path} do not fit config.json, one is missing or of the wrong "
                f"shape: {type(error).__name__}: {error}"
            ) from error
    # Only now: sanitize may set the model up by what is there (gemma3 ties its head).
    _compare(path, dict(tree_flatten(model.parameters())), weights)
    return weights, predictors


def _compare(path: Path, expected: dict[str, mx.array], found: dict[str, mx.array]) -> None:
    """Raise a ModelError that lists tensors missing, extra and of the wrong shape."""
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"not expected: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape of {name}: {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        more = len(problems) - LISTED
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        listed += f"\n  and {more} more" if more > 0 else ""
        raise ModelError(f"the tensors of {path} do not fit config.json:{listed}")

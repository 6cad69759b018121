"""A Hugging Face directory as a checkpoint, through mlx-lm's ``sanitize``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.errors import DamagedError, ModelError
from mlx_flash.model_directory.config import locate_ffn, read_config
from mlx_flash.models import families
from mlx_flash.models.dtypes import FLOATS
from mlx_flash.models.families import Ffn, rowwise
from mlx_flash.models.quantized_rows import QuantScheme, scheme_from
from mlx_flash.models.registry import make_model

from .adapter import Adapter
from .checkpoint import AS_IT_IS, Packing
from .quantization import dequantised, found_in, quantise_modules, recipe_predicate
from .turbosparse import shipped

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "LICENSE*", "NOTICE*")
NOT_SIDE_FILES = ("config.json", "*.index.json", "*.safetensors*")
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
LISTED = 20  # offenders named in a message
QUANTIZATION_KEYS = ("quantization", "quantization_config")
PACKED = (mx.uint32, mx.uint8)


class HFCheckpoint:
    """A Hugging Face directory of safetensors, under mlx-lm's names after its ``sanitize``.

    Nothing is read until ``take``; the memory it needs is that of one tensor, twice that of one in
    which mlx-lm stacks a layer's experts.
    """

    def __init__(
        self, path: Path, packing: Packing = AS_IT_IS, adapter: Adapter | None = None
    ) -> None:
        self.path = path
        self.config = read_config(path)
        if adapter:
            self.config = adapter.adapted_config(self.config)
        self._dtype = FLOATS[packing.dtype] if packing.dtype else None
        _refuse_unfit(path, self.config)
        ffn, _ = locate_ffn(self.config, path)
        with _naming(path):
            quantization = found_in(self.config)
        try:
            files = _weight_files(path)
            self.fingerprint = _fingerprint(path, files)
        except OSError as error:
            raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error
        model, weights, self.predictors = _load_lazily(path, self.config, files)
        if adapter:
            self.fingerprint += adapter.sha256[:16]
            if quantization and not packing.dequantize:
                raise ModelError(
                    f"{path} is quantised ({scheme_from(quantization)}) and an adapter changes "
                    "floats; add --dequantize, or convert the float checkpoint"
                )
        self.row_scheme: QuantScheme | None = None
        with _naming(path):
            if quantization:
                if packing.scheme:
                    raise ModelError(
                        f"quantised already ({scheme_from(quantization)}); leave -q out, or "
                        "convert the float checkpoint"
                    )
                self._set_quantization(quantise_modules(model, quantization, weights))
            if adapter:
                weights = adapter.with_added(weights)
            # Only now: sanitize may set the model up by what is there (gemma3 ties its head).
            _compare(path, dict(tree_flatten(model.parameters())), weights)
            if quantization and packing.dequantize:
                weights = dequantised(weights, self.config)
                self._set_quantization(None)
            if adapter:
                weights = adapter.apply_all(weights)
            if packing.scheme:
                weights = self._quantise(model, weights, ffn, packing)
        self._weights = weights
        self.shapes = {name: tuple(w.shape) for name, w in weights.items()}
        self.dtypes = {name: self._target(name, w.dtype) for name, w in weights.items()}
        if packing.dtype:
            key = "dtype" if "dtype" in self.config else "torch_dtype"
            self.config[key] = packing.dtype

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

    def _quantise(
        self, model: nn.Module, weights: dict[str, mx.array], ffn: Ffn | None, packing: Packing
    ) -> dict[str, mx.array]:
        """The weights as mlx-lm quantises them, but for down projections cut into rows."""
        target, asked = self._dtype, packing.scheme
        if target:
            weights = {
                name: w.astype(target) if mx.issubdtype(w.dtype, mx.floating) else w
                for name, w in weights.items()
            }
        model.load_weights(list(weights.items()))
        predicate = recipe_predicate(packing.recipe, model, asked.group_size)
        own = getattr(model, "quant_predicate", None) if predicate is None else predicate
        rows: set[str] = set()
        if ffn and rowwise(ffn):
            if packing.recipe:
                raise ModelError(
                    f"recipe {packing.recipe} is for mixtures and models without zeros in their "
                    "FFN; this one's rows all have the same number of bits"
                )
            self.row_scheme = asked
            for path, module in families.modules(model, ffn):
                asked.words(module[ffn.down].weight.shape[0])  # d_model in whole groups
                rows.add(f"{path}.{ffn.down}")

        def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return path not in rows and (own is None or own(path, module))

        config = {k: v for k, v in self.config.items() if k not in QUANTIZATION_KEYS}
        group, bits, mode = asked.group_size, asked.bits, asked.mode
        try:
            model, config = utils.quantize_model(
                model, config, group, bits, mode=mode, quant_predicate=choose
            )
        except (ValueError, TypeError) as error:  # of modules that mlx-lm cannot quantise so
            raise ModelError(
                f"mlx-lm cannot quantise this {self.config['model_type']} model to {asked}: {error}"
            ) from error
        self._set_quantization(config["quantization"])
        weights = dict(tree_flatten(model.parameters()))
        if not rows and not any(name.endswith(".scales") for name in weights):
            raise ModelError(
                f"nothing can be quantised to {asked}: no matrix has rows of whole groups; choose "
                "a smaller --q-group-size, or leave -q out"
            )
        return weights

    def _set_quantization(self, quantization: dict[str, Any] | None) -> None:
        """Put mlx-lm's dict, and nothing else about quantisation, into the config."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            for key in QUANTIZATION_KEYS:
                config.pop(key, None)
        if quantization:
            self.config["quantization"] = quantization

    def write_tokenizer(self, out: Path) -> None:
        for pattern in SIDE_FILES:
            for file in sorted(self.path.glob(pattern)):
                if file.is_file() and not any(file.match(p) for p in NOT_SIDE_FILES):
                    shutil.copyfile(file, out / file.name)

    def _target(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        if dtype in PACKED and "quantization" in self.config:
            return dtype
        if dtype not in FLOATS.values():
            raise ModelError(
                f"tensor {name} is {str(dtype).rpartition('.')[2]}; expected one of "
                f"{', '.join(FLOATS)}, or mlx-lm's own quantisation (quantization in config.json)"
            )
        return self._dtype or dtype


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a checkpoint's quantisation name the checkpoint."""
    try:
        yield
    except ModelError as error:
        if str(path) in str(error):
            raise
        raise ModelError(f"{path}: {error}") from error


def _refuse_unfit(path: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for what is no plain float checkpoint of mlx-lm's own classes."""
    if "flash" in config:
        raise ModelError(f"{path} is a model directory already; convert the checkpoint it is from")
    if config.get("model_file"):
        raise ModelError(
            f"{path} brings its own code ({config['model_file']}), which is not run; "
            "expected a model that mlx-lm has"
        )
    if (path / "hf_quant_config.json").exists():
        raise ModelError(
            f"{path} is quantised (hf_quant_config.json), which is not read; use the float "
            "checkpoint, or one in mlx-lm's own quantisation"
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
) -> tuple[nn.Module, dict[str, mx.array], dict[str, mx.array]]:
    """The model, its weights under mlx-lm's names, predictors under the checkpoint's names."""
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            weights.update(mx.load(str(file)))
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    try:
        model = make_model(config)
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
    return model, weights, predictors


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

"""A Hugging Face directory as a checkpoint, through mlx-lm's ``sanitize``.

What is opened goes through steps, of which those in brackets are taken where they are asked for or
where the source is quantised:

    config -> files -> weights -> [modules quantised as the source is] -> compared with the model
           -> [dequantised] -> [adapted] -> [quantised] -> listed

Weights are lazy all the way: nothing is read but the few numbers by which an adapter knows its
base, and the head where it may be tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.common.json_reader import MAX_BYTES
from mlx_flash.errors import DamagedError, ModelError, naming
from mlx_flash.model_directory.config import locate_ffn, read_config
from mlx_flash.model_directory.tokenizer import check_files
from mlx_flash.models.dtypes import FLOATS
from mlx_flash.models.plausible import check_sizes
from mlx_flash.models.quantized_rows import scheme_from
from mlx_flash.models.registry import make_model
from mlx_flash.models.settings.normalise import settle

from .adapter import Adapter
from .checkpoint import UNCHANGED, CheckpointFacts, RequestedFormat
from .model_spec import ModelSpec
from .quantization import KEYS, dequantised, found_in, quantise, quantise_modules
from .side_files import copy_side_files, refuse_pointers, side_files
from .tied_head import has_head, head_left_in, refusing_head, untie
from .turbosparse import predictor_tensors
from .weight_files import find_files

LISTED = 20  # offenders named in a message
PACKED = (mx.uint32, mx.uint8)
Weights = dict[str, mx.array]


class HFCheckpoint:
    """A Hugging Face directory of safetensors, under mlx-lm's names; see ``Checkpoint``.

    Memory is that of one tensor, twice that of one in which mlx-lm stacks a layer's experts.

    Args:
        path: the directory.
        requested: what is to become of its numbers.
        adapter: what changes the model; its base's numbers have to be floats.

    Raises:
        ModelError: the directory lacks something, its parts contradict each other, or what is
            requested cannot be done.
        DamagedError: a weight file is cut off.
    """

    def __init__(
        self,
        path: Path,
        requested: RequestedFormat = UNCHANGED,
        adapter: Adapter | None = None,
    ) -> None:
        self.path = path
        refuse_pointers(path)
        self.config = read_config(path)
        if adapter:
            self.config = adapter.adapted_config(self.config)
        _refuse_unfit(path, self.config)
        with naming(path / "config.json", ModelError):
            self.config = settle(self.config)
        place = locate_ffn(self.config, path)
        with naming(path, ModelError):
            quantisation = found_in(self.config)
        _check_request(path, quantisation, requested, adapter)
        files, self.fingerprint, tensors = find_files(path)
        with naming(path, ModelError):
            check_sizes(self.config, (entry["shape"] for entry in tensors.values()))
        check_files(path)
        for file in side_files(path):
            if (size := file.stat().st_size) > MAX_BYTES:
                raise ModelError(
                    f"{file} has {size:,} bytes; expected at most {MAX_BYTES:,} of a file that is "
                    "copied beside the weights; move it away"
                )
        if adapter:
            self.fingerprint += adapter.sha256[:16]
        model, spare = _with_its_head(path, self.config, files)
        with naming(path, ModelError):
            self.spec = ModelSpec.of_model(model, *place)
        weights, predictors = _load_lazily(path, model, files, spare)
        with naming(path, ModelError):
            if quantisation:
                self._set_quantisation(quantise_modules(model, quantisation, weights))
            _compare(path, model, weights, adapter)
            if quantisation and requested.dequantize:
                weights = dequantised(weights, self.config)
                self._set_quantisation(None)
            if adapter:
                weights = adapter.adapt_all(weights)
            row_scheme = None
            if requested.scheme:
                found = quantise(model, weights, self.config, self.spec.ffn, requested)
                weights, row_scheme = found.weights, found.row_scheme
                self._set_quantisation(found.quantisation)
        self.facts = CheckpointFacts(predictors, row_scheme)
        self._list(weights, requested.dtype)

    def take(self, name: str) -> mx.array:
        """One tensor, evaluated and then forgotten.

        Raises:
            KeyError: no tensor has this name, or it was taken before.
            DamagedError: it cannot be read.
            ModelError: it has numbers that float16 cannot hold.
        """
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
        """Copy tokenizer files, licence and card; no link is followed out of the checkpoint."""
        copy_side_files(self.path, out)

    def _set_quantisation(self, quantisation: dict[str, Any] | None) -> None:
        """Put mlx-lm's dict, and nothing else about quantisation, into the config."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            for key in KEYS:
                config.pop(key, None)
        if quantisation:
            self.config["quantization"] = quantisation

    def _list(self, weights: Weights, dtype: str | None) -> None:
        """Name shapes and types of what there is to take."""
        self._weights = weights
        self.shapes = {name: tuple(w.shape) for name, w in weights.items()}
        target = FLOATS[dtype] if dtype else None
        packed = PACKED if "quantization" in self.config else ()
        self.dtypes = {}
        for name, weight in weights.items():
            if weight.dtype not in (*packed, *FLOATS.values()):
                raise ModelError(
                    f"tensor {name} is {str(weight.dtype).rpartition('.')[2]}; expected one of "
                    f"{', '.join(FLOATS)}, or mlx-lm's own quantisation (quantization in "
                    "config.json)"
                )
            kept = target is None or weight.dtype in packed
            self.dtypes[name] = weight.dtype if kept else target
        if dtype:
            self.config["dtype" if "dtype" in self.config else "torch_dtype"] = dtype


def _refuse_unfit(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a directory that is not a checkpoint of one of mlx-lm's own classes."""
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


def _check_request(
    path: Path,
    quantisation: Mapping[str, Any] | None,
    requested: RequestedFormat,
    adapter: Adapter | None,
) -> None:
    """Raise ModelError where a quantised source cannot become what is requested."""
    if not quantisation:
        return
    with naming(path, ModelError):
        source = scheme_from(quantisation)
    if requested.scheme:
        raise ModelError(
            f"{path}: quantised already ({source}); leave -q out, or convert the float checkpoint"
        )
    if adapter and not requested.dequantize:
        raise ModelError(
            f"{path} is quantised ({source}) and an adapter changes floats; add --dequantize, or "
            "convert the float checkpoint"
        )


def _build(path: Path, config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model of a config, tried out without being evaluated."""
    try:
        model = make_model(config)
        model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
    except Exception as error:  # the config drives foreign code, which may fail in any way
        raise ModelError(
            f"{path / 'config.json'} makes no {config['model_type']} model: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not model.layers:
        raise ModelError(f"{path / 'config.json'} makes a model without layers")
    return model


def _with_its_head(
    path: Path, config: dict[str, Any], files: list[Path]
) -> tuple[nn.Module, set[str]]:
    """The model of a config, and tensors of a head that it ties and that is the same.

    Where the files' head differs the config is changed, so that the model has it.
    """
    model = _build(path, config)
    names, own = head_left_in(model, files)
    if own:
        untie(config)
        with refusing_head(path, config):
            model, names = _build(path, config), set()
            if not has_head(model):
                raise ModelError("mlx-lm's model has no head of its own")
    return model, names


def _load_lazily(
    path: Path, model: nn.Module, files: list[Path], spare: set[str]
) -> tuple[Weights, Weights]:
    """(weights under mlx-lm's names, predictors under the checkpoint's names).

    Args:
        spare: names of tensors that are left out.
    """
    weights: Weights = {}
    for file in files:
        try:
            weights.update(mx.load(str(file)))
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    weights = {name: weight for name, weight in weights.items() if name not in spare}
    predictors = predictor_tensors(weights)
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except Exception as error:  # mlx-lm's code, driven by the config
            raise ModelError(
                f"the tensors of {path} do not fit config.json, one is missing or of the wrong "
                f"shape: {type(error).__name__}: {error}"
            ) from error
    return weights, predictors


def _compare(path: Path, model: nn.Module, weights: Weights, adapter: Adapter | None) -> None:
    """Raise a ModelError that lists tensors missing, unexpected and of the wrong shape.

    Only after ``sanitize``: it may change the model by what is there (gemma3 ties its head).
    """
    if adapter:
        adapter.check_names(weights)
    expected = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    found |= adapter.added if adapter else {}
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"not expected: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape of {name}: {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if scales := [name for name in found.keys() - expected.keys() if name.endswith(".scales")]:
        raise ModelError(
            f"{path}: {len(scales)} tensors are quantised ({min(scales)} and so on), but the "
            "config.json says nothing of them; expected mlx-lm's quantization for each there"
        )
    if problems:
        more = len(problems) - LISTED
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        listed += f"\n  and {more} more" if more > 0 else ""
        raise ModelError(f"the tensors of {path} do not fit config.json:{listed}")

"""Quantised tensors of a checkpoint in mlx-lm's convention: read, checked, dequantised, made.

A quantised matrix is three tensors: packed numbers ``weight``, ``scales`` and, where the mode is
affine, ``biases``. ``config["quantization"]`` says which scheme a model has and, by a module's
path, what differs. mlx-lm writes that, and so does every mlx-community checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from mlx_flash.errors import ModelError
from mlx_flash.models import families
from mlx_flash.models.dtypes import FLOATS
from mlx_flash.models.families import Ffn, rowwise
from mlx_flash.models.quantized_rows import SUFFIXES, QuantizedRows, QuantScheme, scheme_from

from .checkpoint import RequestedFormat

KEYS = ("quantization", "quantization_config")  # of a config
FOREIGN = {"mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}  # quant_method -> mlx-lm's own


def scheme_of(config: Mapping[str, Any], path: str) -> QuantScheme:
    """The scheme of the module at a path, in a config that ``quantise_modules`` has completed."""
    quantization = config["quantization"]
    return scheme_from(quantization.get(path) or quantization)


def found_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The source's quantisation as mlx-lm's dict; None for a float model.

    Raises:
        ModelError: it is of a kind that is not read here.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        own, foreign = part.get("quantization"), part.get("quantization_config")
        if own:
            if not isinstance(own, dict):
                raise ModelError(f"quantization in config.json is {own!r:.80}, expected an object")
            return dict(own)
        if foreign:
            method = foreign.get("quant_method") if isinstance(foreign, dict) else None
            if isinstance(foreign, dict) and "bits" in foreign and method is None:
                return dict(foreign)
            if method not in FOREIGN:
                raise ModelError(
                    f"quantised by {method!r} (quantization_config in config.json), which is not "
                    f"read; expected mlx-lm's own quantisation, {', '.join(FOREIGN)}, a GGUF, or "
                    "the float checkpoint"
                )
            return dict(FOREIGN[method])
    return None


def quantise_modules(
    model: nn.Module, quantization: Mapping[str, Any], weights: Mapping[str, mx.array]
) -> dict[str, Any]:
    """Make a model's modules those that quantised weights load into, as mlx-lm does.

    Returns:
        The quantisation with an entry for every module that differs from its default.

    Raises:
        ModelError: the config contradicts the tensors, or MLX has no such scheme.
    """
    default = scheme_from(quantization)
    normalised: dict[str, Any] = default.kwargs()
    problems: list[str] = []
    other = total = 0

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        nonlocal other, total
        said = quantization.get(path)
        if not hasattr(module, "to_quantized") or said is False:
            return False
        if f"{path}.scales" not in weights:
            if said:
                problems.append(f"{path}: quantised in config.json, the tensor is not")
            return False
        if f"{path}.global_scale" in weights:
            problems.append(f"{path} has a global scale, which is not read")
            return False
        try:
            tensors = utils.infer_quant_config(path, module, weights)
        except (ValueError, KeyError, ZeroDivisionError) as error:
            problems.append(str(error))
            return False
        found = scheme_from(tensors)
        if isinstance(said, dict) and (named := scheme_from(said)) != found:
            problems.append(f"{path}: {named} in config.json, {found} in the tensors")
        total += 1
        if found != default:
            other += 1
            normalised[path] = found.kwargs()
        return found.kwargs()

    nn.quantize(
        model, default.group_size, default.bits, mode=default.mode, class_predicate=predicate
    )
    if total == 0:
        problems.append(f"config.json says {default}, but no tensor is quantised")
    elif other == total and not any(isinstance(v, dict) for v in quantization.values()):
        problems.append(f"config.json says {default}, but no tensor is packed that way")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        raise ModelError(f"the quantisation in config.json contradicts the tensors:{shown}")
    return normalised


def dequantised(weights: Mapping[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Weights with every quantised tensor as floats, computed as they are evaluated.

    Args:
        config: with the quantisation that ``quantise_modules`` returned.
    """
    packed = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
    parts = {f"{path}.{suffix}" for path in packed for suffix in ("weight", *SUFFIXES)}
    found = {name: weight for name, weight in weights.items() if name not in parts}
    for path in packed:
        scheme = scheme_of(config, path)
        arrays = tuple(weights[f"{path}.{name}"] for name in ("weight", *scheme.suffixes))
        scales = arrays[1].dtype
        dtype = scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16
        found[f"{path}.weight"] = QuantizedRows(arrays, scheme).floats(dtype)
    return found


@dataclass(frozen=True)
class Quantised:
    """What ``quantise`` makes.

    Args:
        weights: all of a model's tensors, lazy.
        quantisation: what config.json has to say of them.
        row_scheme: see ``CheckpointFacts``.
    """

    weights: dict[str, mx.array]
    quantisation: dict[str, Any]
    row_scheme: QuantScheme | None


def quantise(
    model: nn.Module,
    weights: Mapping[str, mx.array],
    config: Mapping[str, Any],
    ffn: Ffn | None,
    requested: RequestedFormat,
) -> Quantised:
    """A float model's tensors as mlx-lm quantises them, but for those that rows are cut from.

    Where neurons can be read alone (``families.rowwise``), down projections stay floats: their
    columns are quantised one by one when rows are made.

    Args:
        model: mlx-lm's model of the config; it is changed.
        ffn: entry of a dense family, or None.
        requested: with a scheme.

    Raises:
        ModelError: the scheme or the recipe does not fit this model.
    """
    scheme = requested.scheme
    if scheme is None:
        raise ValueError("no scheme is requested")
    model.load_weights(list(_cast(weights, requested.dtype).items()))
    predicate = _mixed_predicate(requested.quant_predicate, model, scheme.group_size)
    if predicate is None:
        predicate = getattr(model, "quant_predicate", None)
    by_row = _cut_into_rows(model, ffn, requested)

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return path not in by_row and (predicate is None or predicate(path, module))

    plain = {key: value for key, value in config.items() if key not in KEYS}
    try:
        model, found = utils.quantize_model(
            model, plain, scheme.group_size, scheme.bits, scheme.mode, quant_predicate=choose
        )
    except (ValueError, TypeError) as error:  # of modules that mlx-lm cannot quantise so
        raise ModelError(
            f"mlx-lm cannot quantise this {config['model_type']} model to {scheme}: {error}"
        ) from error
    made = dict(tree_flatten(model.parameters()))
    if not by_row and not any(name.endswith(".scales") for name in made):
        raise ModelError(
            f"nothing can be quantised to {scheme}: the group size divides the rows of no matrix; "
            "choose a smaller --q-group-size, or leave -q out"
        )
    return Quantised(made, found["quantization"], scheme if by_row else None)


def _cast(weights: Mapping[str, mx.array], dtype: str | None) -> dict[str, mx.array]:
    if dtype is None:
        return dict(weights)
    return {
        name: w.astype(FLOATS[dtype]) if mx.issubdtype(w.dtype, mx.floating) else w
        for name, w in weights.items()
    }


def _mixed_predicate(recipe: str | None, model: nn.Module, group_size: int) -> Any:
    """mlx-lm's predicate for one of its mixed recipes; None for no recipe.

    Raises:
        ModelError: there is no such recipe, or it is not for this model.
    """
    if recipe is None:
        return None
    if recipe not in QUANT_RECIPES:
        raise ModelError(f"recipe {recipe!r}; expected one of {', '.join(QUANT_RECIPES)}")
    try:
        return mixed_quant_predicate_builder(recipe, model, group_size)
    except ValueError as error:
        raise ModelError(f"recipe {recipe} does not fit this model: {error}") from error


def _cut_into_rows(model: nn.Module, ffn: Ffn | None, requested: RequestedFormat) -> set[str]:
    """Paths of the down projections whose columns are quantised one by one.

    Raises:
        ModelError: rows would need more than one scheme, or the group size does not divide d_model.
    """
    if ffn is None or not rowwise(ffn):
        return set()
    if requested.quant_predicate:
        raise ModelError(
            f"recipe {requested.quant_predicate} is for mixtures and models without zeros in "
            "their FFN; this one's rows all have the same number of bits"
        )
    found = set()
    for path, module in families.modules(model, ffn):
        requested.scheme.words(module[ffn.down].weight.shape[0])  # raises if not
        found.add(f"{path}.{ffn.down}")
    return found

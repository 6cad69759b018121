"""Which numbers of a checkpoint are packed, and how: mlx-lm's convention, read, checked, written.

A quantised tensor is three: packed numbers, ``scales`` and, where the mode is affine, ``biases``;
``config["quantization"]`` says which scheme a model has and, by a module's path, what differs. That
is mlx-lm's convention, and that of every mlx-community checkpoint.

Knows: that convention. Does not know: files, rows, families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from mlx_flash.errors import ModelError
from mlx_flash.models.quantized_rows import SUFFIXES, QuantizedRows, QuantScheme, scheme_from

FOREIGN = {"mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}  # quant_method -> mlx-lm's own


def scheme_of(config: Mapping[str, Any], path: str) -> QuantScheme:
    """What a config with the quantisation of ``quantise_modules`` says of the module at a path."""
    quantization = config["quantization"]
    return scheme_from(quantization.get(path) or quantization)


def found_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantisation that a config names, as mlx-lm's dict; None for a float model.

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


def recipe_predicate(recipe: str | None, model: nn.Module, group_size: int) -> Any:
    """mlx-lm's predicate for one of its mixed recipes; None for no recipe.

    Raises:
        ModelError: no such recipe, or none for this model.
    """
    if recipe is None:
        return None
    if recipe not in QUANT_RECIPES:
        raise ModelError(f"recipe {recipe!r}; expected one of {', '.join(QUANT_RECIPES)}")
    try:
        return mixed_quant_predicate_builder(recipe, model, group_size)
    except ValueError as error:
        raise ModelError(f"recipe {recipe} does not fit this model: {error}") from error


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

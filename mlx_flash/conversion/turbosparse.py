"""Predictors that ship with a checkpoint (TurboSparse, arXiv 2406.05955), as this package's own.

TurboSparse predicts from the residual stream r before the norm in front of the FFN: a row is needed
where fc2(relu(fc1(r))) > 0, without biases. The FFN's input is x = w * r / rms(r). The division
changes no sign, so fc1 with its columns divided by w, put to x, says the same: no second input is
needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx

from mlx_flash.errors import ModelError
from mlx_flash.predictors.predictor_file import LayerPredictor

NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.predictor\.fc[12]\.weight")
LAYER = "model.layers.{}."
NORM = "post_attention_layernorm.weight"
# round(sigmoid(s)) is 1 for s > 0 and 0 for s = 0; ours takes s >= logit(threshold).
THRESHOLD = 0.500001


def predictor_tensors(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors of a checkpoint that ``fold`` takes; empty where no predictors ship with it."""
    layers = {int(match[1]) for match in map(NAME.fullmatch, weights) if match}
    names = [LAYER.format(i) + NORM for i in layers]
    return {name: w for name, w in weights.items() if NAME.fullmatch(name) or name in names}


def fold(tensors: Mapping[str, mx.array], layers: int, dtype: mx.Dtype) -> list[LayerPredictor]:
    """Low-rank predictors on the FFN's input; kind none for layers that have none.

    Raises:
        ModelError: half of a predictor is there, or a norm has a weight of 0.
    """
    found = []
    for i in range(layers):
        prefix = LAYER.format(i)
        names = [prefix + "mlp.predictor.fc1.weight", prefix + "mlp.predictor.fc2.weight"]
        there = [name for name in names if name in tensors]
        if not there:
            found.append(LayerPredictor("none"))
            continue
        if missing := {*names, prefix + NORM} - tensors.keys():
            raise ModelError(f"a predictor of layer {i} lacks {', '.join(sorted(missing))}")
        norm = tensors[prefix + NORM].astype(mx.float32)
        if mx.any(norm == 0).item():
            raise ModelError(
                f"{prefix}{NORM} has weights of 0: the predictor of that layer cannot be used"
            )
        first = (tensors[names[0]].astype(mx.float32) / norm).astype(dtype)
        second = tensors[names[1]].astype(dtype)
        mx.eval(first, second)
        pair = {"first": first, "second": second}
        found.append(LayerPredictor("low-rank", THRESHOLD, "relu", pair))
    return found

"""Activations by the names that Hugging Face configs give them.

Knows: names and functions. Does not know: which key of a config holds the name, model families.
Sources: ``ACT2FN`` of transformers 5.23; for fatrelu ProSparse (arXiv 2402.13516).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import ModelError

Activation = Callable[[mx.array], mx.array]


def fatrelu(x: mx.array, threshold: float = 0.0) -> mx.array:
    """``x`` where it is greater than a threshold, elsewhere 0."""
    return mx.where(x > threshold, x, 0)


FUNCTIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "relu2": nn.relu2,
    "fatrelu": fatrelu,
    "gelu": nn.gelu,
    "gelu_approx": nn.gelu_approx,
    "silu": nn.silu,
}

# Config value -> function.
NAMES = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_approx",
    "gelu_fast": "gelu_approx",
    "gelu_pytorch_tanh": "gelu_approx",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str, model_type: str) -> Activation:
    """The function that a config names; ModelError for a name that is not known."""
    if name not in NAMES:
        raise ModelError(
            f"the activation of this {model_type} model is {name!r}; "
            f"expected one of {', '.join(NAMES)}"
        )
    return FUNCTIONS[NAMES[name]]


def with_threshold(name: str, threshold: float) -> Activation:
    """The function of a name in ``FUNCTIONS``; the threshold is that of fatrelu.

    Raises:
        ModelError: the name is not there, or the threshold negative: 0 would not stay 0.
    """
    if name not in FUNCTIONS:
        raise ModelError(
            f"{name} is no function of one argument that this version knows; "
            f"expected one of {', '.join(FUNCTIONS)}"
        )
    if name != "fatrelu":
        return FUNCTIONS[name]
    if not threshold >= 0:
        raise ModelError(f"the threshold of fatrelu is {threshold}; expected 0 or more")
    return partial(fatrelu, threshold=threshold)

"""Activations by the names that Hugging Face configs give them.

Knows: names and functions. Does not know: which key of a config holds the name, model families.
Source: ``ACT2FN`` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError

Activation = Callable[[mx.array], mx.array]

FUNCTIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "relu2": nn.relu2,
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

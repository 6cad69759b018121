"""mlx-lm's models with the activation of their config, where mlx-lm's FFN has another one built in.

Only each layer's FFN module is replaced; its projections and their names stay. ``families`` says
which models need it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .decoders.common import TransformersArgs
from .families import Ffn, gate_function, projections, up_function


class MLP(nn.Module):
    """The FFN that a table entry describes, over the projections of the module it replaces.

    Args:
        mlp: mlx-lm's FFN module.
        ffn: the entry.
    """

    def __init__(self, mlp: nn.Module, ffn: Ffn) -> None:
        super().__init__()
        for name in projections(ffn).values():
            self[name] = mlp[name]
        self._ffn = ffn
        self._gate_function, self._up_function = gate_function(ffn), up_function(ffn)

    def __call__(self, x: mx.array) -> mx.array:
        ffn = self._ffn
        h = self._gate_function(self[ffn.gate or ffn.up](x))
        if ffn.gate:
            h = h * self._up_function(self[ffn.up](x))
        return self[ffn.down](h)


def override_activation(model_class: type, args_class: type, ffn: Ffn) -> tuple[type, type]:
    """(model class, arguments class) like those given, with every layer's FFN as ``ffn`` says."""

    class Model(model_class):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            for layer in self.layers:
                layer[ffn.module] = MLP(layer[ffn.module], ffn)

    if not issubclass(args_class, TransformersArgs):
        args_class = type("ModelArgs", (TransformersArgs, args_class), {})
    return Model, args_class

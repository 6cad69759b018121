"""Models of mlx-lm with another FFN: that of their config instead of a hard-coded one.

Everything but the activation stays mlx-lm's, the projections and their names too.

Knows: how a layer's FFN is taken out and another put in. Does not know: which families need that
(the table in ``families``), rows, paging.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.models.decoders.common import TransformersArgs

from .families import Ffn, gate_function, projections, up_function


class MLP(nn.Module):
    """What a table entry says, over the projections of the module that it replaces."""

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


def refit(model_class: type, args_class: type, ffn: Ffn) -> tuple[type, type]:
    """(model class, arguments class) like those given, every layer's FFN as ``ffn`` says."""

    class Model(model_class):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            for layer in self.layers:
                layer[ffn.module] = MLP(layer[ffn.module], ffn)

    if not issubclass(args_class, TransformersArgs):
        args_class = type("ModelArgs", (TransformersArgs, args_class), {})
    return Model, args_class

"""GPT-2: mlx-lm's, with two things more.

Attention may be divided by the number of its layer (``scale_attn_by_inverse_layer_idx``), and names
may begin with "transformer.", as transformers saves them; the published ones do not.

Source: ``modeling_gpt2`` of transformers 5.24.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models import gpt2

MODEL_TYPES = ("gpt2",)
FOLLOWS_SETTINGS = True


@dataclass
class ModelArgs(gpt2.ModelArgs):
    scale_attn_by_inverse_layer_idx: bool = False


class Model(gpt2.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        if args.scale_attn_by_inverse_layer_idx:
            for number, layer in enumerate(self.layers, 1):
                layer.attn.scale /= number

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        named = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        return super().sanitize(named)

"""Falcon-H1 (TII, 2025): mlx-lm's, with the multipliers of keys and of attention's input.

mlx-lm puts all multipliers into the weights, but leaves out that of the keys, and that of what
attention takes where values are made of it. A checkpoint whose multipliers are in its weights
already, which mlx-lm tells by its convolutions, stays. Source: ``modeling_falcon_h1`` of
transformers 5.24.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import falcon_h1

MODEL_TYPES = ("falcon_h1",)
FOLLOWS_SETTINGS = True
ModelArgs = falcon_h1.ModelArgs
CONVOLUTION = "model.layers.0.mamba.conv1d.weight"


class Model(falcon_h1.Model):
    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        before = weights[CONVOLUTION].shape
        found = super().sanitize(weights)
        if before[-1] <= before[1]:
            return found
        factors = {
            ".self_attn.k_proj.weight": self.args.key_multiplier,
            ".self_attn.v_proj.weight": self.args.attention_in_multiplier,
        }
        for name, weight in found.items():
            for ending, factor in factors.items():
                if name.endswith(ending):
                    found[name] = weight * factor
        return found

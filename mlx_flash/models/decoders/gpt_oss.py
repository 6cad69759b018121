"""gpt-oss: mlx-lm's, which also takes the experts of a checkpoint that is not in MXFP4.

transformers saves those as one matrix [experts, in, out] for gate and up, their columns in turn,
and one for down, neither with ".weight" in its name. Source: ``modeling_gpt_oss`` of transformers
5.24.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import gpt_oss

MODEL_TYPES = ("gpt_oss",)
FOLLOWS_SETTINGS = True
ModelArgs = gpt_oss.ModelArgs
BOTH, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


class Model(gpt_oss.Model):
    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        floats = {name: w for name, w in weights.items() if name.endswith((BOTH, DOWN))}
        rest = {name: w for name, w in weights.items() if name not in floats}
        named = super().sanitize(rest)
        for name, weight in floats.items():
            rows = weight.swapaxes(-1, -2)
            if name.endswith(DOWN):
                named[f"{name}.weight"] = rows
            else:
                for first, part in enumerate(("gate_proj", "up_proj")):
                    part_name = name.replace("gate_up_proj", f"{part}.weight")
                    named[part_name] = mx.contiguous(rows[:, first::2])
        return named

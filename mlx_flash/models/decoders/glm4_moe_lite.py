"""GLM-4.7's small mixtures: mlx-lm's, the norms of latents with an epsilon of their own.

transformers gives those 1e-6, whatever ``rms_norm_eps`` says. Source: ``modeling_glm4_moe_lite`` of
transformers 5.24.
"""

from __future__ import annotations

from mlx_lm.models import glm4_moe_lite

MODEL_TYPES = ("glm4_moe_lite",)
FOLLOWS_SETTINGS = True
ModelArgs = glm4_moe_lite.ModelArgs
EPSILON = 1e-6


class Model(glm4_moe_lite.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            for name in ("q_a_layernorm", "kv_a_layernorm"):
                if name in layer.self_attn:
                    layer.self_attn[name].eps = EPSILON

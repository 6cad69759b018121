"""ERNIE 4.5's mixtures: mlx-lm's, whose experts are chosen by corrected scores.

mlx-lm throws the correction away, which the published models were trained with. Source:
``modeling_ernie4_5_moe`` of transformers 5.24.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import ernie4_5_moe

MODEL_TYPES = ("ernie4_5_moe",)
FOLLOWS_SETTINGS = True
ModelArgs = ernie4_5_moe.ModelArgs
CORRECTION = "e_score_correction_bias"
SMALLEST_SUM = 1e-12


class MoE(ernie4_5_moe.Ernie4_5_MoeMLP):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.e_score_correction_bias = mx.zeros((args.moe_num_experts,))

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.gate_act(self.gate(x).astype(mx.float32))
        corrected = scores + self.e_score_correction_bias
        chosen = mx.argpartition(-corrected, kth=self.k - 1, axis=-1)[..., : self.k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), SMALLEST_SUM)
        y = self.switch_mlp(x, chosen)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Model(ernie4_5_moe.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            if isinstance(layer.mlp, ernie4_5_moe.Ernie4_5_MoeMLP):
                layer.mlp = MoE(args)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """mlx-lm's; a layer whose checkpoint has no correction gets one of zeros."""
        corrections = {
            name.replace(".moe_statics.", "."): weight.reshape(-1)
            for name, weight in weights.items()
            if name.startswith("model.layers.") and name.endswith(CORRECTION)
        }
        for index, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoE):
                name = f"model.layers.{index}.mlp.{CORRECTION}"
                corrections.setdefault(name, mx.zeros((self.args.moe_num_experts,)))
        return super().sanitize(weights) | corrections

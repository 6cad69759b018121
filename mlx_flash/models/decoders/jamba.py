"""Jamba (arXiv 2403.19887): mlx-lm's, its experts weighed by the scores of all.

mlx-lm divides the scores of the chosen experts by their own sum; Jamba by that of all. A model
without experts is mlx-lm's. Source: ``modeling_jamba`` of transformers 5.24.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import jamba

MODEL_TYPES = ("jamba",)
ModelArgs = jamba.ModelArgs


class SparseBlock(jamba.JambaSparseMoeBlock):
    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.router(x), axis=-1, precise=True)
        k = self.num_experts_per_tok
        chosen = mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)


class Model(jamba.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            if isinstance(layer.feed_forward, jamba.JambaSparseMoeBlock):
                layer.feed_forward = SparseBlock(args)

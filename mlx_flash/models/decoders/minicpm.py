"""MiniCPM (arXiv 2404.06395): mlx-lm's, its logits scaled also where the head is tied.

Knows: what differs from mlx-lm's. Does not know: paging. Sources: the paper's scalings; defaults
of the hub's ``configuration_minicpm``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models import minicpm

from .common import TransformersArgs, settle_head

MODEL_TYPES = ("minicpm",)
EMBEDDING = "model.embed_tokens.weight"


class ModelArgs(TransformersArgs, minicpm.ModelArgs):
    """mlx-lm's, but for what a config means that does not say it: rope_theta 10000, a tied head."""

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Any:
        return super().from_dict({"tie_word_embeddings": True} | dict(params))


class Model(minicpm.Model):
    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        h = self.model(inputs, cache) / (self.args.hidden_size / self.args.dim_model_base)
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = dict(weights)
        settle_head(self, weights, EMBEDDING)
        return weights

"""Experts chosen from the best groups only, where corrected scores may be below 0.

mlx-lm gives the experts of other groups a score of 0, which then may be the best; transformers
leaves them out. Source: ``modeling_deepseek_v3`` of transformers 5.24.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

MODEL_TYPES = (
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "solar_open",
)
FIELDS = ("weight", "e_score_correction_bias", "top_k", "n_group", "topk_group")
FIELDS += ("norm_topk_prob", "routed_scaling_factor")


def has_groups(config: Mapping[str, Any]) -> bool:
    """Whether a config's model leaves groups of experts out."""
    groups = config.get("n_group")
    return config.get("model_type") in MODEL_TYPES and isinstance(groups, int) and groups > 1


def override_groups(model_class: type) -> type:
    """A model class like the one given, which chooses experts as transformers does."""

    class Model(model_class):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            for _, module in self.named_modules():
                if all(hasattr(module, field) for field in FIELDS):
                    module.__class__ = _grouped(type(module))

    return Model


@functools.cache
def _grouped(gate_class: type) -> type:
    """A gate that leaves out the experts of all but its best groups."""

    class Gate(gate_class):
        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            """(chosen experts, their weights), each [..., top_k], of hidden states [..., width]."""
            scores = mx.sigmoid((x @ self.weight.T).astype(mx.float32))
            groups = (scores + self.e_score_correction_bias).reshape(
                *scores.shape[:-1], self.n_group, -1
            )
            best_two = mx.topk(groups, 2, axis=-1).sum(axis=-1)
            out = self.n_group - self.topk_group
            if out > 0:
                left_out = mx.argpartition(best_two, kth=out - 1, axis=-1)[..., :out, None]
                groups = mx.put_along_axis(groups, left_out, mx.array(-math.inf), axis=-2)
            choice = mx.flatten(groups, -2, -1)
            chosen = mx.argpartition(-choice, kth=self.top_k - 1, axis=-1)[..., : self.top_k]
            weights = mx.take_along_axis(scores, chosen, axis=-1)
            if self.top_k > 1 and self.norm_topk_prob:
                weights = weights / weights.sum(axis=-1, keepdims=True)
            return chosen, weights * self.routed_scaling_factor

    Gate.__name__ = Gate.__qualname__ = gate_class.__name__
    Gate.__module__ = gate_class.__module__
    return Gate

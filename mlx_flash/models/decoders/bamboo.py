"""Bamboo and TurboSparse-Mistral (arXiv 2406.05955): Mistral with relu on gate and up.

Attention reaches back a window of tokens in every layer, which mlx-lm's llama, as which it runs
Mistral, leaves out. TurboSparse's own code sets to zero what the predictors in its checkpoint call
zero; they are left out here, and what they miss with them.

The FFN itself is put in by ``activation_override``.

Sources: ``modeling_mistral`` of transformers 5.23; TurboSparse's config.json and weight names.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models import llama

MODEL_TYPES = ("bamboo",)
# Mistral with another activation than mlx-lm's: mlx-lm runs it as llama, without the window.
OVERRIDE_TYPES = ("mistral",)
PREDICTOR = ".mlp.predictor."


@dataclass
class ModelArgs(llama.ModelArgs):
    """mlx-lm's; where the config does not say which layers have the window, all have it."""

    sliding_window: int | None = 4096

    def __post_init__(self) -> None:
        window, limit = self.sliding_window, self.max_position_embeddings
        short = bool(window) and (not limit or window < limit)
        self.window_everywhere = short and self.layer_types is None
        super().__post_init__()


class Model(llama.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        if args.window_everywhere:
            self.model.fa_idx = self.model.swa_idx = 0
            for layer in self.layers:
                layer.use_sliding = True

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize({k: v for k, v in weights.items() if PREDICTOR not in k})

"""Gemma 3: mlx-lm's, with embeddings scaled in their own type.

mlx-lm rounds the scale, the root of the width, to bfloat16 whatever the type; transformers rounds
it to that of the weights. Source: ``modeling_gemma3`` of transformers 5.24.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma3_text

MODEL_TYPES = ("gemma3_text",)
FOLLOWS_SETTINGS = True
ModelArgs = gemma3_text.ModelArgs


class Model(gemma3_text.Model):
    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Logits [batch, length, vocabulary] of token numbers [batch, length]."""
        h = self.model.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if h.dtype != mx.bfloat16:
            scale = mx.array(self.args.hidden_size**0.5)
            h = h * (scale / scale.astype(mx.bfloat16).astype(mx.float32)).astype(h.dtype)
        return super().__call__(inputs, cache, h)

"""A llama with a dense bypass beside every FFN: what is left of SiLU where its zeros are made.

A layer adds ``mlp(n) + bypass(n)`` to the stream, n the normed stream, bypass a matrix [d, d]. SiLU
of a negative argument is small but not nothing: near a constant c it gives ``c * up(n)``, of which
down makes a linear map of n. With that map kept dense, the FFN's own activation can be 0 there. The
bypass is resident; the FFN's rows are paged like any llama's.

The FFN itself is put in by ``activation_override``. Only the adapter relu-smollm2 makes such
models; ``training/relufy`` finds the bypass.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

MODEL_TYPES = ("bypass_llama",)
IN_TRANSFORMERS = False
ModelArgs = llama.ModelArgs


class TransformerBlock(llama.TransformerBlock):
    def __init__(self, args: ModelArgs, use_sliding: bool = False) -> None:
        super().__init__(args, use_sliding)
        self.bypass = nn.Linear(args.hidden_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        normed = self.post_attention_layernorm(h)
        return h + (self.mlp(normed) + self.bypass(normed))


class Model(llama.Model):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.model.layers = [TransformerBlock(args, x.use_sliding) for x in self.model.layers]

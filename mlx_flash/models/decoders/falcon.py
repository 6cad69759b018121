"""Falcon (arXiv 2311.16867): 7B, 40B, 180B, the 11B of Falcon 2, and Falcon-RW.

Three ways to share keys: one for all heads (7B), one per group of heads (the new decoder
architecture of 40B and later), one per head (RW). In the fused projection each group of heads is
its queries, its key, its value, so all three are one layout with 1, some or all heads as groups.
Attention and FFN run side by side after one norm or two, or one after the other (RW). Positions
are rotary or, in RW, ALiBi.

Knows: Falcon's config and weight names, also those of the time before transformers had it, when its
``model_type`` was RefinedWeb (40B) or RefinedWebModel (7B, RW). Does not know: paging. Source:
``modeling_falcon`` of transformers 5.23 with its default attention (sdpa).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)

from mlx_flash.errors import ModelError
from mlx_flash.models.activations import activation

from .common import (
    TiedHeadModel,
    largest,
    make_rope,
    offset_of,
    positions,
    rope_settings,
    run_layers,
)

MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
OLD_NAMES = {
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_layer": "num_hidden_layers",
}


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "falcon"
    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_kv_heads: int | None = None
    num_ln_in_parallel_attn: int | None = None
    ffn_hidden_size: int | None = None
    layer_norm_epsilon: float = 1e-5
    activation: str | None = None
    hidden_act: str | None = None
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> ModelArgs:
        """The arguments of a config; only the 40B of old had groups of heads, and said so."""
        renamed = {
            new: params[old]
            for old, new in OLD_NAMES.items()
            if params.get(old) and params.get(new) is None
        }
        if params.get("n_head_kv"):
            renamed["new_decoder_architecture"] = params.get("new_decoder_architecture", True)
        return super().from_dict(dict(params) | renamed)

    def __post_init__(self) -> None:
        # hidden_act is not Falcon's word, but relufied models have used it.
        self.activation = self.activation or self.hidden_act or "gelu"
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        heads = self.num_attention_heads
        if self.new_decoder_architecture:
            self.num_kv_heads = self.num_kv_heads or heads
            self.parallel_attn = True
            self.num_ln_in_parallel_attn = self.num_ln_in_parallel_attn or 2
        else:
            self.num_kv_heads = 1 if self.multi_query else heads
            self.num_ln_in_parallel_attn = 1
        if self.hidden_size % heads or heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads {heads} has to divide hidden_size {self.hidden_size} and to "
                f"be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.num_ln_in_parallel_attn not in (1, 2):
            raise ModelError(
                f"num_ln_in_parallel_attn is {self.num_ln_in_parallel_attn!r}; expected 1 or 2"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def norm(self) -> nn.LayerNorm:
        """A layer norm of the config's epsilon."""
        return nn.LayerNorm(self.hidden_size, eps=self.layer_norm_epsilon)


def alibi_slopes(heads: int) -> mx.array:
    """How steeply each head's attention falls with distance (arXiv 2108.12409), bfloat16."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return mx.array(slopes, mx.bfloat16)


class Alibi:
    """Attention masks with ALiBi added.

    The bias grows with the key's position and is not taken relative to the query: in exact numbers
    softmax makes these the same, but transformers rounds the bias to bfloat16.
    """

    def __init__(self, args: ModelArgs) -> None:
        self.slopes = alibi_slopes(args.num_attention_heads)[:, None, None]
        self.scale = math.sqrt(args.head_dim)

    def mask(self, h: mx.array, cache: Any) -> mx.array:
        """The additive mask [batch or 1, heads, queries or 1, keys] for a layer's input."""
        length, offset = h.shape[1], offset_of(cache)
        limit = getattr(cache, "max_size", None)
        if limit is not None and largest(offset) + length > limit:
            raise ModelError(
                f"a falcon model with alibi needs every key in order, but its cache keeps {limit}; "
                "run it without a limit on the KV cache's size"
            )
        causal = create_attention_mask(h, cache, return_array=True)
        keys = offset + length if causal is None else causal.shape[-1]
        at = mx.maximum(positions(offset, length - keys, length), 0)
        at = at.reshape(-1, 1, 1, keys).astype(mx.bfloat16)
        bias = (self.slopes * at).astype(h.dtype) / self.scale
        return bias if causal is None else mx.where(causal, bias, mx.finfo(h.dtype).min)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, groups = args.hidden_size, args.num_kv_heads
        self.groups = groups
        self.head_dim = args.head_dim
        self.scale = args.head_dim**-0.5
        fused = (args.num_attention_heads + 2 * groups) * args.head_dim
        self.query_key_value = nn.Linear(width, fused, bias=args.bias)
        self.dense = nn.Linear(width, width, bias=args.bias)
        if not args.alibi:
            settings = rope_settings(
                args.rope_parameters, args.rope_scaling, rope_theta=args.rope_theta
            )
            self.rope = make_rope(args.head_dim, settings, args.max_position_embeddings)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, width = x.shape
        fused = self.query_key_value(x).reshape(batch, length, self.groups, -1, self.head_dim)
        queries = fused[..., :-2, :].reshape(batch, length, -1, self.head_dim).swapaxes(1, 2)
        keys, values = fused[..., -2, :].swapaxes(1, 2), fused[..., -1, :].swapaxes(1, 2)
        if "rope" in self:
            offset = offset_of(cache)
            queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.dense(y.swapaxes(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(args.hidden_size, args.ffn_hidden_size, bias=args.bias)
        self.dense_4h_to_h = nn.Linear(args.ffn_hidden_size, args.hidden_size, bias=args.bias)
        self._activation = activation(args.activation, args.model_type)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(self._activation(self.dense_h_to_4h(x)))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attention = Attention(args)
        self.mlp = MLP(args)
        if args.num_ln_in_parallel_attn == 2:
            self.ln_attn = args.norm()
            self.ln_mlp = args.norm()
        else:
            self.input_layernorm = args.norm()
        if not args.parallel_attn:
            self.post_attention_layernorm = args.norm()

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if "ln_attn" in self:
            return x + self.mlp(self.ln_mlp(x)) + self.self_attention(self.ln_attn(x), mask, cache)
        h = self.input_layernorm(x)
        attended = self.self_attention(h, mask, cache)
        if "post_attention_layernorm" not in self:
            return x + self.mlp(h) + attended
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class FalconModel(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = args.norm()
        self._alibi = Alibi(args) if args.alibi else None

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        make_mask = self._alibi.mask if self._alibi else create_attention_mask
        return self.ln_f(run_layers(self.h, self.word_embeddings(inputs), cache, make_mask))


class Model(TiedHeadModel):
    STACK, EMBEDDING = "transformer", "word_embeddings"

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, FalconModel(args), args.hidden_size)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.transformer.h

"""Persimmon 8B (Adept, 2023): norms on queries and keys, partial rotary positions, relu squared.

Knows: Persimmon's config and weight names. Does not know: paging; Fuyu, whose text part it is.
Source: ``modeling_persimmon`` of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, scaled_dot_product_attention

from mlx_flash.errors import ModelError
from mlx_flash.models.activations import activation

from .common import (
    ROTARY_SHARE,
    TiedHeadModel,
    make_rope,
    offset_of,
    rope_settings,
    run_layers,
)

MODEL_TYPES = ("persimmon",)


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "persimmon"
    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str | None = "relu2"
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = True
    max_position_embeddings: int = 16384
    partial_rotary_factor: float | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        self.hidden_act = self.hidden_act or "relu2"
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    def norm(self, width: int | None = None) -> nn.LayerNorm:
        """A layer norm of the config's epsilon."""
        return nn.LayerNorm(width or self.hidden_size, eps=self.layer_norm_eps)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width = args.hidden_size
        self.heads = args.num_attention_heads
        self.head_dim = width // self.heads
        self.scale = self.head_dim**-0.5
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        if args.qk_layernorm:
            self.q_layernorm = args.norm(self.head_dim)
            self.k_layernorm = args.norm(self.head_dim)
        share = args.partial_rotary_factor
        settings = rope_settings(
            args.rope_parameters,
            args.rope_scaling,
            rope_theta=args.rope_theta,
            partial_rotary_factor=ROTARY_SHARE if share is None else share,
        )
        dims = int(self.head_dim * settings["partial_rotary_factor"])
        self.rope = make_rope(dims, settings, args.max_position_embeddings)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, width = x.shape
        fused = self.query_key_value(x).reshape(batch, length, self.heads, 3, self.head_dim)
        queries, keys, values = (fused[..., i, :] for i in range(3))
        if "q_layernorm" in self:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        queries, keys, values = (a.swapaxes(1, 2) for a in (queries, keys, values))
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
        self.dense_h_to_4h = nn.Linear(args.hidden_size, args.intermediate_size)
        self.dense_4h_to_h = nn.Linear(args.intermediate_size, args.hidden_size)
        self._activation = activation(args.hidden_act, args.model_type)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(self._activation(self.dense_h_to_4h(x)))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = args.norm()
        self.post_attention_layernorm = args.norm()

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class PersimmonModel(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.final_layernorm = args.norm()

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.final_layernorm(run_layers(self.layers, self.embed_tokens(inputs), cache))


class Model(TiedHeadModel):
    STACK, EMBEDDING = "model", "embed_tokens"

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, PersimmonModel(args), args.hidden_size)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

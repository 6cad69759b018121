"""OPT (arXiv 2205.01068), and Galactica, which is OPT without biases and norm weights.

Positions are learned and begin at row 2 of their table. The 350m norms after each half of a layer
instead of before, has no last norm, and narrower embeddings with a projection on either side.

Knows: OPT's config and weight names. Does not know: paging; the FFN, which lies in the layer itself
in a checkpoint, is a module here so that it has a place. Source: ``modeling_opt`` of transformers
5.23.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, scaled_dot_product_attention

from mlx_flash.errors import ModelError
from mlx_flash.models.activations import activation

from .common import TiedHeadModel, largest, offset_of, positions, run_layers

MODEL_TYPES = ("opt",)
FIRST_POSITION = 2
FFN_NAME = re.compile(r"(layers\.\d+)\.(fc[12]\.)")


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "opt"
    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    activation_function: str | None = "relu"
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        self.word_embed_proj_dim = self.word_embed_proj_dim or self.hidden_size
        self.activation_function = self.activation_function or "relu"
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    def norm(self) -> nn.LayerNorm:
        """A layer norm; its epsilon is in no config."""
        return nn.LayerNorm(self.hidden_size, eps=1e-5, affine=self.layer_norm_elementwise_affine)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, bias = args.hidden_size, args.enable_bias
        self.heads = args.num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, width = x.shape
        queries, keys, values = (
            project(x).reshape(batch, length, self.heads, -1).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.out_proj(y.swapaxes(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self._activation = activation(args.activation_function, args.model_type)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._activation(self.fc1(x)))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm_first = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = args.norm()
        self.mlp = MLP(args)
        self.final_layer_norm = args.norm()

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self.mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self.mlp(x))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, narrow = args.hidden_size, args.word_embed_proj_dim
        self.max_position_embeddings = args.max_position_embeddings
        self.embed_tokens = nn.Embedding(args.vocab_size, narrow)
        self.embed_positions = nn.Embedding(args.max_position_embeddings + FIRST_POSITION, width)
        if narrow != width:
            self.project_in = nn.Linear(narrow, width, bias=False)
            self.project_out = nn.Linear(width, narrow, bias=False)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = args.norm()

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if "project_in" in self:
            h = self.project_in(h)
        h = h + self._positions(offset_of(cache[0] if cache else None), inputs.shape[1])
        h = run_layers(self.layers, h, cache)
        if "final_layer_norm" in self:
            h = self.final_layer_norm(h)
        return self.project_out(h) if "project_out" in self else h

    def _positions(self, offset: int | mx.array, length: int) -> mx.array:
        if (stop := largest(offset) + length) > self.max_position_embeddings:
            raise ModelError(
                f"{stop} tokens are more than the {self.max_position_embeddings} that this opt "
                "model has positions for; use a shorter prompt or generate fewer tokens"
            )
        return self.embed_positions(positions(offset, 0, length) + FIRST_POSITION)


class OPTModel(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.decoder = Decoder(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.decoder(inputs, cache)


class Model(TiedHeadModel):
    STACK, EMBEDDING = "model", "decoder.embed_tokens"

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, OPTModel(args), args.word_embed_proj_dim)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights under this module's names; in a checkpoint the FFN lies in the layer itself."""
        return super().sanitize({FFN_NAME.sub(r"\1.mlp.\2", k): v for k, v in weights.items()})

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.decoder.layers

"""Shapes of published models: what their config.json says, as far as it bears on memory.

Numbers are those of the models' own config.json files; ``parameters`` is what their cards say, in
thousand millions, and a test holds the shapes against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BITS_4 = "4 bit"  # mlx-lm's own quantisation, groups of 64
BITS_16 = "bfloat16"
MXFP4 = "MXFP4"  # experts in MXFP4, all else in bfloat16, as gpt-oss is published


@dataclass(frozen=True)
class Shape:
    """A published model.

    Args:
        name: as its card has it.
        parameters: thousand millions of numbers, as its card has it.
        stored: BITS_4, BITS_16 or MXFP4.
        config: keys of its config.json.
        active: share of the FFN's neurons that fire for a token, as published, where the
            activation has zeros; None for other models.
    """

    name: str
    parameters: float
    stored: str
    config: dict[str, Any]
    active: float | None = None


def _config(kind: str, **keys: Any) -> dict[str, Any]:
    shared = {"model_type": kind, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    return shared | {"max_position_embeddings": 32768, "tie_word_embeddings": False} | keys


def _llama(hidden: int, ffn: int, layers: int, heads: int, **keys: Any) -> dict[str, Any]:
    return _config(
        "llama", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
        **keys,
    )  # fmt: skip


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, **keys: Any) -> dict[str, Any]:
    return _config(
        "qwen3", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        rope_theta=1000000.0, **keys,
    )  # fmt: skip


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return _config(
        "gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=experts,
        num_experts_per_tok=4, vocab_size=201088, sliding_window=128, rope_theta=150000.0,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
    )  # fmt: skip


SHAPES = (
    Shape("Llama-3.2-1B", 1.24, BITS_4, _llama(2048, 8192, 16, 32, tie_word_embeddings=True)),
    Shape("Llama-3.2-3B", 3.21, BITS_4, _llama(3072, 8192, 28, 24, tie_word_embeddings=True)),
    Shape("Qwen3-4B", 4.02, BITS_4, _qwen3(2560, 9728, 36, 32, tie_word_embeddings=True)),
    Shape("Llama-3.1-8B", 8.03, BITS_4, _llama(4096, 14336, 32, 32)),
    Shape("Qwen3-8B", 8.19, BITS_4, _qwen3(4096, 12288, 36, 32)),
    Shape(
        "Gemma-3-12B", 11.77, BITS_4,
        _config(
            "gemma3_text", hidden_size=3840, intermediate_size=15360, num_hidden_layers=48,
            num_attention_heads=16, num_key_value_heads=8, head_dim=256, vocab_size=262208,
            sliding_window=1024, sliding_window_pattern=6, query_pre_attn_scalar=256,
            rope_theta=1000000.0, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
            hidden_act=None,
        ),
    ),
    Shape("Qwen3-14B", 14.8, BITS_4, _qwen3(5120, 17408, 40, 40)),
    Shape("Qwen3-32B", 32.8, BITS_4, _qwen3(5120, 25600, 64, 64)),
    Shape("Llama-3.3-70B", 70.6, BITS_4, _llama(8192, 28672, 80, 64)),
    Shape("gpt-oss-20b", 20.9, MXFP4, _gpt_oss(24, 32)),
    Shape(
        "Qwen3-30B-A3B", 30.5, BITS_4,
        _config(
            "qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
            mlp_only_layers=[], vocab_size=151936, rope_theta=1000000.0,
        ),
    ),
    Shape(
        "Mixtral-8x7B", 46.7, BITS_4,
        _config(
            "mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
            num_experts_per_tok=2, vocab_size=32000, rope_theta=1000000.0,
        ),
    ),
    Shape("gpt-oss-120b", 116.8, MXFP4, _gpt_oss(36, 128)),
    Shape(
        "OPT-6.7B", 6.66, BITS_16,
        {
            "model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
            "num_attention_heads": 32, "word_embed_proj_dim": 4096, "vocab_size": 50272,
            "max_position_embeddings": 2048, "activation_function": "relu",
            "do_layer_norm_before": True,
        },
        active=0.03,
    ),
    Shape(
        "TurboSparse-Mistral-7B", 7.2, BITS_16,
        _config(
            "bamboo", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, hidden_act="relu",
            rope_theta=10000.0,
        ),
        active=0.1,
    ),
)  # fmt: skip

"""A llama checkpoint of random weights, of any size, made in little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .from_tests import write_tokenizer


def random_llama(
    path: Path, hidden: int, rows: int, layers: int, vocab: int = 32000, **changed: Any
) -> Path:
    """Write random bfloat16 weights, a shard a layer, unless they are there; returns ``path``.

    Args:
        hidden, rows: width of the model and of its FFN.
        changed: other keys of config.json.
    """
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    heads = hidden // 64
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": rows, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8), "rms_norm_eps": 1e-5, "vocab_size": vocab,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    kv = 64 * config["num_key_value_heads"]
    shards: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "lm_head.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for i in range(layers):
        at = f"model.layers.{i}."
        shards.append(
            {
                at + "self_attn.q_proj.weight": (hidden, hidden),
                at + "self_attn.k_proj.weight": (kv, hidden),
                at + "self_attn.v_proj.weight": (kv, hidden),
                at + "self_attn.o_proj.weight": (hidden, hidden),
                at + "mlp.gate_proj.weight": (rows, hidden),
                at + "mlp.up_proj.weight": (rows, hidden),
                at + "mlp.down_proj.weight": (hidden, rows),
                at + "input_layernorm.weight": (hidden,),
                at + "post_attention_layernorm.weight": (hidden,),
            }
        )
    random = np.random.default_rng(0)
    # bfloat16 bits of normal numbers; a prime length keeps repetition out of rows and columns.
    noise = (random.standard_normal(8_388_593).astype(np.float32) * hidden**-0.5).view(np.uint32)
    noise = (noise >> 16).astype(np.uint16)
    where, at = {}, 0
    for n, tensors in enumerate(shards, 1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for key, shape in tensors.items():
            size = int(np.prod(shape))
            bits = np.resize(np.roll(noise, -at)[:size], size).reshape(shape)
            if len(shape) == 1:
                bits = np.full(shape, 0x3F80, np.uint16)
            arrays[key] = mx.array(bits).view(mx.bfloat16)
            at = (at + size) % noise.size
        mx.save_safetensors(str(path / name), arrays, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(path, 300)
    (path / "config.json").write_text(json.dumps(config | changed))
    return path

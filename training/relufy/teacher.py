"""The dense SmolLM2 in torch, with the very weights that conversion gives.

Knows: where a checkpoint's tensors come from (``mlx_flash.conversion``), transformers' llama. Does
not know: what is trained. Weights are float32: a GGUF's quantised tensors are made floats.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlx_flash.conversion.checkpoint import RequestedFormat
from mlx_flash.conversion.open_checkpoint import open_checkpoint


def load(source: Path, scratch: Path) -> tuple[LlamaForCausalLM, object]:
    """The model in evaluation mode, without gradients, and its tokenizer."""
    checkpoint = open_checkpoint(source, RequestedFormat("float32", dequantize=True))
    config = LlamaConfig(**checkpoint.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {
        name: torch.from_numpy(np.array(checkpoint.take(name))) for name in checkpoint.shapes
    }
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # Rotary tables are buffers that no checkpoint holds.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    scratch.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tokenizer(scratch)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(scratch)

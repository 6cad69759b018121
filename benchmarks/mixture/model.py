"""The random mixture that the runs page: Qwen3-30B-A3B's shape with fewer layers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks.support.from_tests import write_tokenizer

FULL_LAYERS, FULL_VOCAB = 48, 151936  # of Qwen3-30B-A3B
HIDDEN, FFN, EXPERTS, TOP_K = 2048, 768, 128, 8
HEADS, KV_HEADS, HEAD = 32, 4, 128
BITS, GROUP = 4, 64
SPREAD = 0.2  # of the logarithm of a router row's length
SHARP = 2.0  # standard deviation of an average expert's score
BRANCH = 1.5  # what the last matrices of attention and experts multiply by, to be felt
START = 20_000  # words into the novel


class Writer:
    """Random tensors in mlx-community's format, a shard at a time."""

    def __init__(self, path: Path, dtype: mx.Dtype) -> None:
        self.path, self.dtype = path, dtype
        self.random = np.random.default_rng(0)
        self.arrays: dict[str, mx.array] = {}
        self.where: dict[str, str] = {}

    def packed(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """A matrix, or a stack of them, whose products have ``gain`` times the input's deviation.

        Random words are numbers from 0 to 15 about 7.5 with a deviation of 4.61. Scales differ by
        up to a quarter.
        """
        *many, width = shape
        words = self.random.integers(0, 2**32, (*many, width * BITS // 32), np.uint32)
        scale = np.float32(gain * width**-0.5 / 4.61)
        noise = self.random.random((*many, width // GROUP), np.float32)
        scales = mx.array(scale * (0.75 + noise / 2)).astype(self.dtype)
        self.arrays[f"{name}.weight"] = mx.array(words)
        self.arrays[f"{name}.scales"] = scales
        self.arrays[f"{name}.biases"] = (-7.5 * scales.astype(mx.float32)).astype(self.dtype)

    def ones(self, name: str, width: int, value: float = 1.0) -> None:
        self.arrays[f"{name}.weight"] = mx.full((width,), value).astype(self.dtype)

    def router(self, name: str, experts: int) -> None:
        """Rows of uneven length: an expert with a long one is among the best more often."""
        rows = self.random.standard_normal((experts, HIDDEN), np.float32)
        length = np.exp(SPREAD * self.random.standard_normal((experts, 1), np.float32))
        weight = mx.array(rows * length * np.float32(SHARP * HIDDEN**-0.5)).astype(self.dtype)
        found = mx.quantize(weight, group_size=GROUP, bits=8)
        for suffix, array in zip(("weight", "scales", "biases"), found, strict=True):
            self.arrays[f"{name}.{suffix}"] = array

    def shard(self) -> None:
        """Write what there is."""
        name = f"model-{len(set(self.where.values())) + 1:05d}.safetensors"
        mx.save_safetensors(str(self.path / name), self.arrays, {"format": "mlx"})
        self.where |= dict.fromkeys(self.arrays, name)
        self.arrays = {}


def checkpoint(path: Path, layers: int, vocab: int, dtype: str, experts: int = EXPERTS) -> Path:
    """Made if it is not there; layer by layer, so that it takes little memory."""
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    writer = Writer(path, getattr(mx, dtype))
    for name in ("model.embed_tokens", "lm_head"):
        writer.packed(name, vocab, HIDDEN, gain=HIDDEN**0.5 if "embed" in name else 1.0)
    writer.ones("model.norm", HIDDEN)
    writer.shard()
    quantization: dict = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            writer.packed(f"{at}self_attn.{name}", heads * HEAD, HIDDEN)
        writer.packed(f"{at}self_attn.o_proj", HIDDEN, HEADS * HEAD, gain=BRANCH)
        writer.ones(f"{at}self_attn.q_norm", HEAD, 2.0)  # attention that looks at some, not all
        writer.ones(f"{at}self_attn.k_norm", HEAD)
        writer.ones(f"{at}input_layernorm", HIDDEN)
        writer.ones(f"{at}post_attention_layernorm", HIDDEN)
        writer.router(f"{at}mlp.gate", experts)
        quantization[f"{at}mlp.gate"] = {"group_size": GROUP, "bits": 8}
        writer.packed(f"{at}mlp.switch_mlp.gate_proj", experts, FFN, HIDDEN)
        writer.packed(f"{at}mlp.switch_mlp.up_proj", experts, FFN, HIDDEN)
        writer.packed(f"{at}mlp.switch_mlp.down_proj", experts, HIDDEN, FFN, gain=2 * BRANCH)
        writer.shard()
    index = {"metadata": {}, "weight_map": writer.where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(path, 300)
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": 6144, "moe_intermediate_size": FFN, "num_hidden_layers": layers,
        "num_experts": experts, "num_experts_per_tok": TOP_K, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "rms_norm_eps": 1e-6,
        "vocab_size": vocab, "max_position_embeddings": 40960, "rope_theta": 1e6,
        "tie_word_embeddings": False, "hidden_act": "silu", "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": dtype,
        "quantization": quantization,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path

"""Mixtures whose matrices are quantised in the file: against the floats that they stand for."""

import json

import mlx.core as mx
import numpy as np
import pytest
from fixtures.gguf_files import golden, metadata, vocabulary, write
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from mlx_flash import load
from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.gguf.checkpoint import GGUFCheckpoint

WIDTH, EXPERTS, VOCAB, HEAD, HEADS, KV_HEADS = 256, 3, 64, 32, 8, 2
KEPT = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "MXFP4"]
SCALES_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of float16 scales in a block
EXPERT_TENSORS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def shapes():
    """Those of a qwen3moe of one layer, rows of whole blocks of 256."""
    queries, keys = HEAD * HEADS, HEAD * KV_HEADS
    matrices = {
        "attn_q": (queries, WIDTH),
        "attn_k": (keys, WIDTH),
        "attn_v": (keys, WIDTH),
        "attn_output": (WIDTH, queries),
        "ffn_gate_inp": (EXPERTS, WIDTH),
        **dict.fromkeys(EXPERT_TENSORS, (EXPERTS, WIDTH, WIDTH)),
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
        "attn_q_norm": (HEAD,),
        "attn_k_norm": (HEAD,),
    }
    layer = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    rest = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    return layer | {f"{name}.weight": shape for name, shape in rest.items()}


def blocks(kind, shape, rng):
    """Random blocks of a type: any bytes are one, if their scales are numbers."""
    weights, size = GGML_QUANT_SIZES[Kind[kind]]
    data = rng.integers(0, 256, (np.prod(shape) // weights, size), dtype=np.uint8)
    scale = 0.01 / 64 if kind.endswith("_K") else 0.01
    for at in SCALES_AT.get(kind, (0,)):
        scales = rng.uniform(0.5, 1, len(data)) * scale
        data[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":  # an exponent, then codes
        data[:, :2] = rng.integers(119, 122, (len(data), 2))
    return data.reshape(*shape[:-1], -1)


def make(path, kind):
    """A mixture whose matrices but the router's are of a type, as llama.cpp quantises them."""
    config = golden("qwen3moe").config
    config |= {"hidden_size": WIDTH, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS}
    config |= {"num_hidden_layers": 1, "head_dim": HEAD, "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": KV_HEADS, "vocab_size": VOCAB}
    meta = {f"qwen3moe.{key}": value for key, value in metadata(config).items()}
    rng = np.random.default_rng(8)
    tensors, kinds = {}, {}
    for name, shape in shapes().items():
        if len(shape) > 1 and "gate_inp" not in name:
            tensors[name], kinds[name] = blocks(kind, shape, rng), Kind[kind]
        else:
            mean = 1.0 if len(shape) == 1 else 0.0
            tensors[name] = rng.normal(mean, 0.1, shape).astype(np.float32)
    write(path, "qwen3moe", meta | vocabulary(VOCAB), tensors, kinds)
    return tensors


def logits(directory, **options):
    model, _ = load(directory, **options)
    found = np.array(model(mx.array([[3, 17, 42, 9, 60, 33, 5, 21]]))[0])
    if hasattr(model, "flash"):
        model.flash.close()
    return found


@pytest.mark.parametrize("kind", KEPT)
def test_kept_types_give_the_floats_logits(tmp_path, kind):
    make(path := tmp_path / "x.gguf", kind)
    floats = convert(path, tmp_path / "floats", dtype="float32", dequantize=True)
    packed = convert(path, tmp_path / "packed", dtype="float32")
    assert json.loads((packed / "config.json").read_text())["flash"]["requantised"] == {}
    expected = logits(floats, use_flash=False)
    assert np.abs(expected).max() > 0.1
    for options in ({"use_flash": False}, {"cache_share": 0.7}):
        assert np.abs(logits(packed, **options) - expected).max() < 1e-4


def test_stacked_experts_of_a_type_that_is_quantised_anew(tmp_path):
    tensors = make(path := tmp_path / "x.gguf", "Q6_K")
    source = GGUFCheckpoint(path, dtype="float32")
    assert source.facts.requantised["Q6_K"][1:] == (8, 32)
    for name, part in zip(EXPERT_TENSORS, ("gate_proj", "up_proj", "down_proj"), strict=True):
        parts = [
            source.take(f"model.layers.0.mlp.switch_mlp.{part}.{kind}")
            for kind in ("weight", "scales", "biases")
        ]
        found = np.array(mx.dequantize(*parts, group_size=32, bits=8))
        expected = dequantize(tensors[f"blk.0.{name}.weight"], Kind.Q6_K)
        assert found.shape == expected.shape == (EXPERTS, WIDTH, WIDTH)
        assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.006

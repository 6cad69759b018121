"""Tiny random checkpoints of every mixture, laid out the way Hugging Face ships them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import tiny
from mlx_lm.utils import load_model, load_tokenizer, quantize_model, save

EXPERTS = 8
WINDOW = {"sliding_window": 32}
KEPT = ("e_score_correction_bias", "_blocks", "_scales")  # tensors whose dtype is not the model's


def _moe(**other: Any) -> dict[str, Any]:
    """A config under llama's names, with 8 experts, two of them per token."""
    base = {
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    return tiny._llama(**base | other)


def _local(**other: Any) -> dict[str, Any]:
    """The same, under Mixtral's names."""
    base = {"num_experts": None, "num_local_experts": EXPERTS, "moe_intermediate_size": None}
    return _moe(**base | {"intermediate_size": 64, "norm_topk_prob": None} | other)


def _deepseek(**other: Any) -> dict[str, Any]:
    """The same, under DeepSeek's names: the first layer dense, the best groups first."""
    base = {
        "first_k_dense_replace": 1,
        "head_dim": None,
        "kv_lora_rank": 64,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts": None,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "v_head_dim": 16,
    }
    return _moe(**base | other)


TINY_MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _deepseek(),
    "gpt_oss": _local(
        layer_types=["sliding_attention", "full_attention"] * 2,
        quantization_config={
            "modules_to_not_convert": ["model.layers.*.mlp.router", "lm_head"],
            "quant_method": "mxfp4",
        },
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "rope_type": "yarn",
            "truncate": False,
        },
        swiglu_limit=7.0,
        **WINDOW,
    ),
    "mixtral": _local(head_dim=None),
    "nemotron_h": _moe(
        attention_bias=False,
        conv_kernel=4,
        hybrid_override_pattern="ME*-E",
        layer_norm_epsilon=1e-5,
        mamba_head_dim=16,
        mamba_num_heads=8,
        mamba_proj_bias=False,
        mlp_bias=False,
        moe_latent_size=None,
        moe_shared_expert_intermediate_size=128,
        n_group=1,
        n_groups=2,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts=None,
        num_hidden_layers=5,
        routed_scaling_factor=1.5,
        ssm_state_size=16,
        time_step_limit=[0.0, 100.0],
        topk_group=1,
        use_bias=False,
        use_conv_bias=True,
    ),
    "olmoe": _moe(intermediate_size=64, moe_intermediate_size=None, num_key_value_heads=4),
    "qwen2_moe": _moe(head_dim=None, norm_topk_prob=False, shared_expert_intermediate_size=128),
    "qwen3_moe": _moe(decoder_sparse_step=1, mlp_only_layers=[1]),
}


def config(model_type: str, **overrides: Any) -> dict[str, Any]:
    """A valid config.json of a tiny mixture."""
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return {"model_type": model_type} | tokens | TINY_MIXTURES[model_type] | overrides


def make_mixture(
    path: Path,
    model_type: str = "mixtral",
    dtype: str = "float32",
    seed: int = 0,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write config, weights and tokenizer of a tiny random mixture to ``path``; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    cfg = config(model_type, **overrides) | {"torch_dtype": dtype}
    weights = {name: _scaled(name, w) for name, w in tiny._random_weights(cfg, seed).items()}
    weights = _shipped(model_type, cfg, weights)
    weights = {
        name: w if name.endswith(KEPT) else w.astype(getattr(mx, dtype))
        for name, w in weights.items()
    }
    tiny._write_weights(path, weights, shards)
    tiny.write_tokenizer(path, tiny.VOCAB)
    tiny._write_json(path / "config.json", cfg)
    return path


def _scaled(name: str, w: mx.array) -> mx.array:
    """tiny's random weights; stacked matrices, which it scales as one each, scaled alike."""
    if w.ndim == 3 and name.endswith(".weight") and "conv" not in name:
        return w * w.shape[1] ** 0.5
    return w


# Name of a projection in the switch module -> the same in the checkpoint.
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
UNGATED = {"fc1": "up_proj", "fc2": "down_proj"}


def _split(
    weights: dict[str, mx.array], switch: str = "switch_mlp", names: dict[str, str] | None = None
) -> dict[str, mx.array]:
    """Experts as separate matrices: ``experts.0.gate_proj.weight`` and so on."""
    pattern = re.compile(rf"(.*\.){re.escape(switch)}\.(\w+)\.(\w+)$")
    shipped = {}
    for name, w in weights.items():
        if match := pattern.match(name):
            prefix, projection, kind = match.groups()
            projection = (names or {}).get(projection, projection)
            for n in range(w.shape[0]):
                shipped[f"{prefix}experts.{n}.{projection}.{kind}"] = w[n]
        else:
            shipped[name] = w
    return shipped


def _gpt_oss(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """MXFP4: rows of gate and up in turn in one tensor, blocks of 32 numbers in 16 bytes each."""
    shipped = {}
    for name, w in weights.items():
        if ".experts.up_proj." in name:
            continue
        new = name
        if ".experts.gate_proj." in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            w = mx.stack([w, up], axis=2).flatten(1, 2)
            new = name.replace("gate_proj", "gate_up_proj")
        if ".experts." not in name:
            shipped[name] = w
        elif name.endswith(".bias"):
            shipped[new.replace(".bias", "_bias")] = w
        else:
            packed, scales = mx.quantize(w, 32, 4, mode="mxfp4")
            blocks = mx.unflatten(packed.view(mx.uint8), -1, (-1, 16))
            shipped[new.replace(".weight", "_blocks")] = blocks
            shipped[new.replace(".weight", "_scales")] = scales
    return shipped


def _mla(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The two halves of multi-head latent attention's expansion as the one matrix shipped."""
    shipped = dict(weights)
    for name in weights:
        if name.endswith(".embed_q.weight"):
            prefix = name.removesuffix("embed_q.weight")
            key = shipped.pop(name).swapaxes(-1, -2)
            value = shipped.pop(f"{prefix}unembed_out.weight")
            both = mx.concatenate([key, value], axis=1)
            shipped[f"{prefix}kv_b_proj.weight"] = both.flatten(0, 1)
    return shipped


def _shipped(
    model_type: str, cfg: dict[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """The weights in the layout of the Hub."""
    if cfg.get("tie_word_embeddings"):
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    if model_type == "gpt_oss":  # not as mxfp4: mlx-lm's own layout is all that it takes
        return _gpt_oss(weights) if cfg.get("quantization_config") else weights
    if model_type == "mixtral":
        return _split(weights, names=MIXTRAL)
    if model_type == "nemotron_h":
        conv = {k: v.moveaxis(2, 1) for k, v in weights.items() if "conv1d.weight" in k}
        return _split(weights | conv, names=UNGATED)
    return _mla(_split(weights))


def quantised(
    path_in: Path, path_out: Path, bits: int, group_size: int, mode: str = "affine"
) -> Path:
    """Write what mlx-lm's own conversion makes of a checkpoint to ``path_out``; returns it."""
    model, cfg = load_model(path_in)
    model, cfg = quantize_model(model, cfg, group_size, bits, mode)
    save(path_out, path_in, model, load_tokenizer(path_in), cfg)
    return path_out

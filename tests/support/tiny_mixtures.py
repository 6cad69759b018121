"""Tiny random checkpoints of every mixture, laid out the way Hugging Face ships them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model, load_tokenizer, quantize_model, save
from support import tiny

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


def _text(config: dict[str, Any], **other: Any) -> dict[str, Any]:
    """A multimodal config, with the text model's own inside."""
    return {"text_config": config, "vision_config": {"depth": 2}} | other


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_BAILING = {
    "first_k_dense_replace": 1,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 64,
    "n_group": 4,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "topk_group": 2,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
}
_LATENT = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_INDEX = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16}
_GRANITE = tiny._GRANITE | {"mlp_bias": None}
_KIMI = {
    "first_k_dense_replace": 1,
    "linear_attn_config": {
        "full_attn_layers": [4],
        "head_dim": 32,
        "kda_layers": [1, 2, 3],
        "num_heads": 4,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "norm_topk_prob": None,
    "num_expert_group": 1,
    "num_experts_per_tok": None,
    "num_experts_per_token": 2,
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
} | _LATENT
_LONGCAT = {
    "attention_bias": False,
    "expert_ffn_hidden_size": 64,
    "ffn_hidden_size": 128,
    "hidden_size": 64,
    "max_position_embeddings": 512,
    "mla_scale_kv_lora": True,
    "mla_scale_q_lora": True,
    "moe_topk": 2,
    "n_routed_experts": EXPERTS,
    "num_attention_heads": 4,
    "num_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 3.0,
    "vocab_size": tiny.VOCAB,
    "zero_expert_num": 4,
    "zero_expert_type": "identity",
} | _LATENT
_DELTA = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "partial_rotary_factor": 0.5,
    "shared_expert_intermediate_size": 64,
}
_MAMBA = tiny._MAMBA
_GEMMA4 = tiny._gemma(
    enable_moe_block=True,
    global_head_dim=32,
    hidden_size_per_layer_input=0,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_experts=EXPERTS,
    num_kv_shared_layers=0,
    top_k_experts=2,
    vocab_size_per_layer_input=tiny.VOCAB,
    **_SLIDING,
    **WINDOW,
)
_QWEN3 = _moe(decoder_sparse_step=1, mlp_only_layers=[])
_QWEN3_5 = _moe(
    norm_topk_prob=None,
    rope_parameters={
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_type": "default",
    },
    **_DELTA,
)
_MISTRAL4 = _deepseek(
    moe_layer_freq=None,
    rope_parameters={
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 4.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "type": "yarn",
    },
    scoring_func=None,
    topk_method=None,
)

TINY_MIXTURES: dict[str, dict[str, Any]] = {
    "Klear": _moe(
        attention_bias=False,
        decoder_sparse_step=1,
        head_dim=None,
        mlp_only_layers=[0],
        n_shared_experts=1,
    ),
    "afmoe": _moe(
        mup_enabled=True,
        n_group=1,
        num_dense_layers=1,
        num_shared_experts=1,
        route_norm=True,
        route_scale=2.8,
        score_func="sigmoid",
        topk_group=1,
        **_SLIDING,
        **WINDOW,
    ),
    "bailing_hybrid": _moe(
        group_norm_size=2, layer_group_size=2, num_hidden_layers=4, **_BAILING, **_LATENT
    ),
    "bailing_moe": _moe(head_dim=None, norm_head=True, **_BAILING),
    "bailing_moe_linear": _moe(group_norm_size=2, layer_group_size=2, **_BAILING),
    "bailing_moe_v3": _moe(
        layer_group_size=4,
        num_key_value_heads=None,
        short_conv_kernel_size=4,
        **_BAILING | {"moe_router_enable_expert_bias": None, "partial_rotary_factor": None},
        **_LATENT,
    ),
    "deepseek": _deepseek(
        n_group=None, topk_group=None, q_lora_rank=None, kv_lora_rank=None, v_head_dim=None
    ),
    "deepseek_v2": _deepseek(
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 4.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 128,
            "type": "yarn",
        },
        topk_method="group_limited_greedy",
    ),
    "deepseek_v3": _deepseek(),
    "deepseek_v32": _deepseek(**_INDEX),
    "deepseek_v41": _deepseek(
        compress_ratios=[0, 4, 4],
        first_k_dense_replace=None,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        head_dim=32,
        index_head_dim=32,
        index_n_heads=2,
        index_source_layer_ids=[-1, 1, 1],
        index_topk=8,
        kv_source_layer_ids=[-1, 1, 1],
        num_hidden_layers=3,
        o_groups=2,
        o_lora_rank=32,
        rms_norm_eps=1e-6,
        scoring_func="sqrtsoftplus",
        sliding_window=16,
        swiglu_limit=10.0,
    ),
    "dots1": _deepseek(head_dim=16, kv_lora_rank=None, q_lora_rank=None),
    "ernie4_5_moe": _moe(
        moe_k=2,
        moe_layer_interval=1,
        moe_layer_start_index=1,
        moe_num_experts=EXPERTS,
        moe_num_shared_experts=1,
        norm_topk_prob=None,
        num_experts=None,
        num_experts_per_tok=None,
        use_bias=False,
    ),
    "exaone_moe": _moe(
        is_moe_layer=[False, True, True, True],
        n_group=1,
        num_shared_experts=1,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_group=1,
        **_SLIDING,
        **WINDOW,
    ),
    "gemma4": _text(_GEMMA4, vocab_size=tiny.VOCAB),
    "gemma4_text": _GEMMA4,
    "glm4_moe": _deepseek(
        attention_bias=True,
        head_dim=16,
        num_key_value_heads=2,
        partial_rotary_factor=0.5,
        use_qk_norm=True,
    )
    | {"rope_scaling": None},
    "glm4_moe_lite": _deepseek(n_group=1, topk_group=1),
    "glm_moe_dsa": _deepseek(
        attention_bias=False,
        n_group=1,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        rope_theta=None,
        topk_group=1,
        **_INDEX,
    ),
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
    "granitemoe": _local(head_dim=None, tie_word_embeddings=True, **_GRANITE),
    "granitemoehybrid": _local(
        head_dim=None,
        layer_types=["mamba", "attention"] * 2,
        position_embedding_type="nope",
        shared_intermediate_size=64,
        tie_word_embeddings=True,
        **_GRANITE,
        **_MAMBA,
    ),
    "hunyuan": _moe(
        attention_bias=False,
        cla_share_factor=2,
        head_dim=None,
        moe_intermediate_size=[64, 64, 128, 64],
        moe_topk=[2, 2, 2, 2],
        num_experts_per_tok=None,
        num_shared_expert=[1, 1, 1, 1],
        rope_scaling={"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
        tie_word_embeddings=True,
        use_cla=True,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
    ),
    "jamba": _moe(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        head_dim=None,
        intermediate_size=64,
        moe_intermediate_size=None,
        norm_topk_prob=None,
        **_MAMBA,
    ),
    "kimi_k25": _text(_deepseek(model_type="deepseek_v3")),
    "kimi_k3": _text(
        _moe(
            activation_situ_beta=4.0,
            activation_situ_linear_beta=25.0,
            attn_res_block_size=2,
            head_dim=None,
            hidden_act="situ",
            latent_moe_use_norm=True,
            mla_use_output_gate=True,
            model_type="kimi_linear",
            routed_expert_hidden_size=64,
            **_KIMI,
        )
    ),
    "kimi_linear": _moe(head_dim=32, model_max_length=512, **_KIMI | {"q_lora_rank": None}),
    "kimi_vl": _text(_deepseek()),
    "laguna": _moe(
        gating=True,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        moe_routed_scaling_factor=2.5,
        norm_topk_prob=None,
        num_attention_heads_per_layer=[4, 2, 4, 2],
        rope_parameters={
            "full_attention": {"rope_theta": 100000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        shared_expert_intermediate_size=64,
        **_SLIDING,
        **WINDOW,
    ),
    "lfm2_moe": _moe(
        conv_L_cache=3,
        conv_bias=False,
        head_dim=None,
        layer_types=["conv", "full_attention"] * 2,
        norm_eps=1e-5,
        num_dense_layers=1,
        routed_scaling_factor=1.0,
        tie_word_embeddings=True,
        use_expert_bias=True,
    ),
    "llama4": _text(
        _local(
            attention_bias=False,
            attention_chunk_size=32,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=128,
            model_type="llama4_text",
            num_experts_per_tok=1,
            use_qk_norm=True,
        )
        | {"rope_scaling": None}
    ),
    "longcat_flash": _LONGCAT | {"attention_method": "MLA", "router_bias": False},
    "longcat_flash_ngram": _LONGCAT
    | {"emb_neighbor_num": 3, "emb_split_num": 2, "ngram_vocab_size_ratio": 2},
    "mellum": _moe(
        rope_parameters={
            "full_attention": {"rope_theta": 100000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        **_SLIDING,
        **WINDOW,
    ),
    "mimo_v2_flash": _deepseek(
        add_full_attention_sink_bias=False,
        add_swa_attention_sink_bias=True,
        attention_value_scale=0.7,
        head_dim=32,
        hybrid_layer_pattern=[0, 1, 1, 0],
        kv_lora_rank=None,
        layernorm_epsilon=1e-5,
        moe_layer_freq=[0, 1, 1, 1],
        n_shared_experts=None,
        num_key_value_heads=2,
        partial_rotary_factor=0.5,
        q_lora_rank=None,
        qk_nope_head_dim=None,
        qk_rope_head_dim=None,
        routed_scaling_factor=None,
        sliding_window_size=32,
        swa_head_dim=32,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_rope_theta=10000.0,
        swa_v_head_dim=16,
    )
    | {"n_shared_experts": None, "routed_scaling_factor": None},
    "minimax": _local(
        rotary_dim=8, scoring_func="sigmoid", shared_intermediate_size=0, use_qk_norm=True
    ),
    "minimax_m3_vl": _text(
        _local(
            dense_intermediate_size=128,
            moe_layer_freq=[0, 1, 1, 1],
            rotary_dim=8,
            routed_scaling_factor=2.0,
            shared_intermediate_size=64,
            sparse_attention_config={
                "sparse_attention_freq": [0, 1, 1, 1],
                "sparse_block_size": 16,
                "sparse_index_dim": 16,
                "sparse_local_block": 1,
                "sparse_num_index_heads": 2,
                "sparse_topk_blocks": 2,
            },
            use_gemma_norm=True,
            use_qk_norm=True,
        )
    ),
    "mistral3": _text(_MISTRAL4 | {"model_type": "mistral4"}),
    "mistral4": _MISTRAL4,
    "mixtral": _local(head_dim=None),
    "muse_spark": _text(
        _local(
            final_logit_softcapping=30.0,
            intermediate_size=None,
            layer_rope_theta=[10000.0, 0.0] * 2,
            moe_hidden_size=64,
            moe_intermediate_size=64,
            num_shared_experts=0,
            output_multiplier=1.0,
            post_norm_eps=1e-5,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            routed_scaling_factor=1.0,
            **_SLIDING,
            **WINDOW,
        ),
        audio_config={"out_hidden_size": 64},
        vision_config=None,
    ),
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
    "phimoe": _local(
        head_dim=None,
        rope_scaling={
            "long_factor": [1.0] * 8,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 512,
            "short_factor": [1.0] * 8,
            "short_mscale": 1.2,
            "type": "longrope",
        },
        original_max_position_embeddings=512,
        router_jitter_noise=0.01,
    ),
    "phixtral": {
        "model_dim": 64,
        "num_experts_per_tok": 2,
        "num_heads": 4,
        "num_layers": 3,
        "num_local_experts": EXPERTS,
        "num_vocab": tiny.VOCAB,
        "rotary_dim": 8,
    },
    "qwen2_moe": _moe(head_dim=None, norm_topk_prob=False, shared_expert_intermediate_size=128),
    "qwen3_5_moe": _text(_QWEN3_5),
    "qwen3_moe": _moe(decoder_sparse_step=1, mlp_only_layers=[1]),
    "qwen3_next": _moe(decoder_sparse_step=1, mlp_only_layers=[], **_DELTA),
    "qwen3_vl_moe": _text(_QWEN3 | {"model_type": "qwen3_vl_moe_text"}),
    "solar_open": _deepseek(
        head_dim=16, n_group=1, num_key_value_heads=2, partial_rotary_factor=1.0, topk_group=1
    ),
    "step3p5": _moe(
        attention_other_setting={
            "attention_type": "sliding_attention",
            "head_dim": 16,
            "num_attention_groups": 4,
            "num_attention_heads": 4,
        },
        moe_layers_enum="1,2,3",
        moe_num_experts=EXPERTS,
        moe_router_scaling_factor=3.0,
        moe_top_k=2,
        norm_expert_weight=True,
        norm_topk_prob=None,
        num_attention_groups=2,
        num_experts=None,
        num_experts_per_tok=None,
        partial_rotary_factors=[0.5, 1.0] * 2,
        share_expert_dim=64,
        swiglu_limits=[0, 0, 7.0, 0],
        swiglu_limits_shared=[0, 0, 0, 16.0],
        **_SLIDING,
        **WINDOW,
    ),
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
Weights = dict[str, mx.array]


def _split(
    weights: Weights,
    switch: str = "switch_mlp",
    names: dict[str, str] | None = None,
    block: str = "experts",
) -> Weights:
    """Experts as separate matrices: ``experts.0.gate_proj.weight`` and so on."""
    pattern = re.compile(rf"(.*\.){re.escape(switch)}\.(\w+)\.(\w+)$")
    shipped = {}
    for name, w in weights.items():
        if match := pattern.match(name):
            prefix, projection, kind = match.groups()
            projection = (names or {}).get(projection, projection)
            for n in range(w.shape[0]):
                shipped[f"{prefix}{block}.{n}.{projection}.{kind}"] = w[n]
        else:
            shipped[name] = w
    return shipped


def _fused(
    weights: Weights,
    switch: str,
    names: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj"),
    transposed: bool = False,
) -> Weights:
    """Experts in two tensors, of gate and up rows, and of down's; of columns if transposed."""
    shipped = {}
    for name, w in weights.items():
        prefix, found, projection = name.partition(f"{switch}.")
        if not found or not projection.endswith("_proj.weight"):
            shipped[name] = w
        elif projection == "gate_proj.weight":
            both = mx.concatenate([w, weights[f"{prefix}{switch}.up_proj.weight"]], axis=1)
            shipped[prefix + names[0]] = both.swapaxes(1, 2) if transposed else both
        elif projection == "down_proj.weight":
            shipped[prefix + names[1]] = w.swapaxes(1, 2) if transposed else w
    return shipped


def _renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    """Every name with each pair's first string replaced by its second."""
    shipped = {}
    for name, w in weights.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        shipped[name] = w
    return shipped


def _convolved(weights: Weights) -> Weights:
    """Kernels of convolutions with their axes in PyTorch's order."""
    return {
        name: w.moveaxis(2, 1) if re.search(r"conv(1d)?\.weight$", name) else w
        for name, w in weights.items()
    }


def _centred(weights: Weights, pattern: str) -> Weights:
    """Gains of norms as their difference from 1."""
    return {name: w - 1 if re.search(pattern, name) else w for name, w in weights.items()}


def _gpt_oss(weights: Weights) -> Weights:
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


def _mla(weights: Weights) -> Weights:
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


BAILING = (r"\.mlp\.gate\.gate_proj\.", ".mlp.gate.")
LANGUAGE_MODEL = (r"^language_model\.model\.", "model.language_model.")
QWEN_NORMS = r"(layernorm|model\.norm|language_model\.norm|[qk]_norm)\.weight$"


def _kimi(weights: Weights) -> Weights:
    """Kimi's blocks, and its linear attention's projections and kernels apart."""
    for name in [name for name in weights if re.search(r"\.qkv_(proj|conv\.conv)\.", name)]:
        parts = mx.split(weights[name], 3, axis=0)
        weights |= {name.replace(".qkv_", f".{c}_"): w for c, w in zip("qkv", parts, strict=True)}
        del weights[name]
    weights = _renamed(
        weights,
        (r"\.mlp\.(switch_mlp|shared_experts|gate\.|routed_)", r".block_sparse_moe.\1"),
        (r"\.mlp\.(e_score_correction_bias)", r".block_sparse_moe.gate.\1"),
        (r"\.([qkv])_conv\.conv\.", r".\1_conv1d."),
    )
    return _mla(_convolved(_split(weights, names=MIXTRAL)))


# model_type -> what makes the layout of the Hub of mlx-lm's own, where that is not separate experts
# and one matrix of latent attention.
LAYOUTS: dict[str, Callable[[Weights], Weights]] = {
    **dict.fromkeys(("Klear", "afmoe", "dots1"), lambda w: _split(w, "experts")),
    **dict.fromkeys(
        ("bailing_hybrid", "bailing_moe", "bailing_moe_linear"),
        lambda w: _mla(_renamed(_split(w), BAILING)),
    ),
    "bailing_moe_v3": lambda w: _convolved(_mla(_split(w))),
    "deepseek_v41": lambda w: w,  # mlx-lm's own, as converted: the published ones are packed
    "exaone_moe": lambda w: _renamed(_split(w), (r"\.gate\.(e_score)", r".\1")),
    **dict.fromkeys(
        ("gemma4", "gemma4_text"),
        lambda w: _renamed(
            _fused(w, "experts.switch_glu"), (r"^language_model\.model", "model.language_model")
        ),
    ),
    **dict.fromkeys(
        ("granitemoe", "granitemoehybrid"),
        lambda w: _convolved(
            _fused(w, "switch_mlp", ("input_linear.weight", "output_linear.weight"))
        ),
    ),
    "jamba": lambda w: _convolved(_split(w)),
    "kimi_k3": _kimi,
    "kimi_linear": _kimi,
    "kimi_vl": _split,  # latent attention as mlx-lm has it: it does not take the published matrix
    "laguna": lambda w: _renamed(
        _split(w),
        (r"\.gate\.proj\.", ".gate."),
        (r"\.gate\.(e_score)", r".experts.\1"),
    ),
    "lfm2_moe": lambda w: _renamed(
        _convolved(_split(w)),
        (r"(feed_forward.*)\.gate_proj\.", r"\1.w1."),
        (r"(feed_forward.*)\.down_proj\.", r"\1.w2."),
        (r"(feed_forward.*)\.up_proj\.", r"\1.w3."),
    ),
    "llama4": lambda w: _fused(w, "experts", transposed=True),
    "longcat_flash_ngram": lambda w: _renamed(
        _mla(_split(w)), (r"ngram_embeddings\.word_embeddings", "embed_tokens")
    ),
    **dict.fromkeys(
        ("minimax", "minimax_m3_vl", "mixtral", "phimoe"), lambda w: _split(w, names=MIXTRAL)
    ),
    "mistral3": lambda w: _renamed(_mla(_fused(w, "switch_mlp")), LANGUAGE_MODEL),
    "mistral4": lambda w: _mla(_fused(w, "switch_mlp")),
    "muse_spark": lambda w: w,
    "nemotron_h": lambda w: _convolved(_split(w, names=UNGATED)),
    "phixtral": lambda w: _split(w, block="mlp"),
    "qwen3_5_moe": lambda w: _renamed(
        _convolved(_centred(_fused(w, "switch_mlp"), QWEN_NORMS)), LANGUAGE_MODEL
    ),
    "qwen3_next": lambda w: _convolved(_centred(_split(w), QWEN_NORMS)),
    "qwen3_vl_moe": lambda w: _renamed(
        _fused(w, "switch_mlp", transposed=True),
        LANGUAGE_MODEL,
        (r"^language_model\.lm_head", "lm_head"),
    ),
    "step3p5": lambda w: _renamed(
        _centred(w, r"norm\.weight$"),
        (r"\.mlp\.switch_mlp\.", ".moe."),
        (r"\.mlp\.gate\.gate\.", ".moe.gate."),
        (r"\.mlp\.gate\.router_bias", ".moe.router_bias"),
        (r"\.mlp\.share_expert\.", ".share_expert."),
    ),
}


def _shipped(model_type: str, cfg: dict[str, Any], weights: Weights) -> Weights:
    """The weights in the layout of the Hub."""
    if cfg.get("tie_word_embeddings"):
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    if model_type == "gpt_oss":  # not as mxfp4: mlx-lm's own layout is all that it takes
        return _gpt_oss(weights) if cfg.get("quantization_config") else weights
    return LAYOUTS.get(model_type, lambda w: _mla(_split(w)))(weights)


def quantised(
    path_in: Path, path_out: Path, bits: int, group_size: int, mode: str = "affine"
) -> Path:
    """Write what mlx-lm's own conversion makes of a checkpoint to ``path_out``; returns it."""
    model, cfg = load_model(path_in)
    model, cfg = quantize_model(model, cfg, group_size, bits, mode)
    save(path_out, path_in, model, load_tokenizer(path_in), cfg)
    return path_out

"""Rules of mixtures. Sources: their configs in transformers 5.24, mlx-lm 0.32.2's modules."""

from __future__ import annotations

from .checks import (
    dense_first,
    equal_heads,
    every,
    for_some_layer,
    full_attention_interval,
    full_every_nth,
    minimax_rotation,
    rope_but_every_fourth,
    shares_width,
    sparse_layers,
    time_limits,
)
from .dense import FALSE, IS_UNTIED, NO_BIAS, TIED, TRUE, UNTIED
from .rules import PLAIN, SCALED, Rope, Rules

SILU = {"hidden_act": ("silu", "swish")}
# Of multi-head latent attention.
LATENT = {
    "num_key_value_heads": "every head has its own",
    "head_dim": "qk_rope_head_dim says it",
    "qk_head_dim": "its two parts say it",
}
_INDEXED = SILU | UNTIED | {"mlp_bias": FALSE, "layer_types": every("indexed_attention")}
_PARTS = ("full_attn", "linear_attn", "mlp")
_LATENT = Rope(replaceable=False, scales_attention=True)

MIXTURES: dict[str, Rules] = {
    "afmoe": Rules(
        window="typed",
        native_window="layer_types",
        # mlx-lm knows these four keys, transformers computes what they are by default.
        only=SILU
        | NO_BIAS
        | {"n_group": (1,), "topk_group": (1,), "route_norm": TRUE, "score_func": ("sigmoid",)},
        harmless={"global_attn_every_n_layers": "layer_types says it"},
    ),
    "deepseek_v2": Rules(
        Rope(
            kinds=frozenset({"yarn"}),
            replaceable=False,
            scales_attention=True,
            # mlx-lm's module knows yarn only; with a factor of 1 it scales nothing.
            plain={"type": "yarn", "factor": 1.0},
        ),
        only=SILU | UNTIED | {"mlp_bias": FALSE},
        harmless=LATENT | {"norm_topk_prob": "transformers ignores it"},
    ),
    "deepseek_v3": Rules(_LATENT, only=SILU | UNTIED | {"rope_interleave": TRUE}, harmless=LATENT),
    "deepseek_v32": Rules(
        _LATENT, only=_INDEXED, harmless=LATENT, translate=dense_first, written=("mlp_layer_types",)
    ),
    "dots1": Rules(window="after", only=SILU | NO_BIAS),
    "ernie4_5_moe": Rules(
        Rope(kinds=PLAIN, default_theta=500000.0),
        only=SILU | {"use_bias": FALSE, "moe_norm_min": (1e-12,)},
    ),
    "bailing_hybrid": Rules(None, unread={"linear_num_heads": None}),
    "exaone_moe": Rules(
        window="typed",
        native_window="layer_types",
        absent={"head_dim": equal_heads},
        only=SILU | {"sliding_window": for_some_layer},
        harmless={"first_k_dense_replace": "mlp_layer_types says it"},
        translate=sparse_layers,
        written=("mlp_layer_types",),
    ),
    "glm4_moe": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_share=0.5, kinds=PLAIN),
        absent={"rope_scaling": None, "head_dim": equal_heads},
        only=SILU | UNTIED,
    ),
    "glm4_moe_lite": Rules(
        _LATENT,
        only=SILU | UNTIED | {"rope_interleave": TRUE},
        harmless=LATENT,
        translate=dense_first,
        written=("mlp_layer_types",),
    ),
    "step3p5": Rules(None, unread={"n_routed_experts": "moe_num_experts", "rope_parameters": None}),
    "glm_moe_dsa": Rules(
        Rope(reads_new=True, replaceable=False),
        only=_INDEXED | {"indexer_types": every("full")},
        harmless=LATENT,
        translate=dense_first,
        written=("mlp_layer_types",),
    ),
    "gpt_oss": Rules(
        Rope(default_theta=150000.0, kinds=SCALED),
        window="alternating",
        native_window="layer_types",
        only=UNTIED | {"attention_bias": TRUE, "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
    "granitemoe": Rules(absent=IS_UNTIED, only=SILU),
    "kimi_linear": Rules(
        Rope(reads_new=True, replaceable=False),
        only=SILU | NO_BIAS | {"q_lora_rank": (None,)},
        harmless={"qk_head_dim": LATENT["qk_head_dim"]}
        | {"mlp_layer_types": "first_k_dense_replace says it"}
        | dict.fromkeys(
            ("layer_types", "linear_head_dim", "linear_conv_kernel_dim"),
            "linear_attn_config says it",
        ),
        unread={"linear_num_heads": "linear_attn_config"},
    ),
    "laguna": Rules(
        Rope(reads_new=True, replaceable=False, kinds=SCALED | {"dynamic"}),
        window="typed",
        native_window="layer_types",
        only=SILU | {"moe_apply_router_weight_on_input": FALSE},
    ),
    "lfm2_moe": Rules(Rope(kinds=PLAIN, default_theta=1000000.0), only=TIED),
    "llama4": Rules(
        Rope(default_theta=500000.0),
        only=SILU
        | NO_BIAS
        | UNTIED
        | {"no_rope_layers": rope_but_every_fourth, "no_rope_layer_interval": (4,)},
        harmless={"moe_layers": "follows a step", "layer_types": "no_rope_layers says it"},
    ),
    "longcat_flash": Rules(_LATENT, only=SILU | UNTIED, harmless=LATENT),
    "mellum": Rules(
        Rope(reads_new=True, replaceable=False, kinds=SCALED - {"linear"} | {"dynamic"}),
        window="typed",
        native_window="layer_types",
        names={"num_experts": "num_local_experts"},
        only=SILU | NO_BIAS | {"mlp_layer_types": every("sparse")},
        harmless={"intermediate_size": "no layer is dense"},
    ),
    "mimo_v2_flash": Rules(
        None,
        only=SILU | NO_BIAS | UNTIED,
        harmless={"rms_norm_eps": "layernorm_epsilon says it"},
        unread={
            "layer_types": "hybrid_layer_pattern",
            "mlp_layer_types": "moe_layer_freq",
            "rope_parameters": "swa_rope_theta",
            "sliding_window": "sliding_window_size",
        },
    ),
    "minimax": Rules(
        Rope(kinds=PLAIN, default_theta=1000000.0, replaceable=False),
        # MiniMax-M2 in mlx-lm; in transformers one whose layers are linear by turns.
        only=SILU
        | {"sliding_window": (None,), "layer_types": every("full_attention")}
        | {f"{part}_{which}_factor": (1,) for part in _PARTS for which in ("alpha", "beta")},
        harmless={"block_size": "of linear attention"},
    ),
    "mistral4": Rules(
        Rope(reads_new=True, replaceable=False),
        only=SILU,
        harmless=LATENT | {"intermediate_size": "dense layers have moe_intermediate_size"},
    ),
    "minimax_m2": Rules(
        Rope(kinds=PLAIN, default_theta=5000000.0),
        absent={"head_dim": equal_heads, "shared_intermediate_size": 0},  # the latter is not read
        only=SILU,
        translate=minimax_rotation,
    ),
    "mixtral": Rules(
        Rope(kinds=PLAIN, default_theta=1000000.0),
        window="every",
        only=SILU | {"head_dim": shares_width},
    ),
    "muse_spark": Rules(
        None,
        only=NO_BIAS | UNTIED | {"residual_gate_temperature": (0.3,)},
        harmless={"intermediate_size": "no layer is dense"},
    ),
    "nemotron_h": Rules(
        None,
        only=UNTIED
        | {"mamba_hidden_act": ("silu",), "mlp_hidden_act": ("relu2",)}
        | {"sliding_window": (None,), "use_bias": FALSE},
        harmless={
            "expand": "mamba_num_heads and mamba_head_dim say it",
            "residual_in_fp32": "the same sums in float32",
        },
        translate=time_limits,
        written=("time_step_min",),
    ),
    "olmoe": Rules(absent=IS_UNTIED, only=SILU | {"clip_qkv": (None,)}),
    "phimoe": Rules(
        Rope(kinds=PLAIN, default_theta=1000000.0, mscales=True),
        window="every",
        only=SILU
        | UNTIED
        | {"attention_bias": TRUE, "lm_head_bias": TRUE}
        | {"num_experts_per_tok": (2,)},  # its sparse mixer is for two
    ),
    "qwen2_moe": Rules(
        Rope(kinds=PLAIN, spelling="type"),
        window="qwen_moe",
        only=SILU
        | {
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([],),
            "norm_topk_prob": FALSE,
            "qkv_bias": TRUE,
        }
        | UNTIED,
        harmless={"intermediate_size": "no layer is dense"},
    ),
    "qwen3_moe": Rules(
        Rope(kinds=PLAIN),
        window="switched",
        names={"num_experts": "num_local_experts"},
        absent={"head_dim": equal_heads},
        only=SILU | NO_BIAS,
    ),
    "qwen3_next": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_share=0.25),
        only=SILU | {"layer_types": full_every_nth},
        translate=full_attention_interval,
    ),
    "qwen3_5_moe": Rules(
        Rope(reads_new=True, replaceable=False),
        only=SILU | NO_BIAS | {"layer_types": full_every_nth},
    ),
    "solar_open": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_theta=1000000.0, kinds=PLAIN),
        absent={"intermediate_size": 0, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0},
        only=SILU | UNTIED,
    ),
}

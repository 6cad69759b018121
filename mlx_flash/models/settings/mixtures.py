"""Rules of mixtures. Sources: their configs in transformers 5.24, mlx-lm 0.32.2's modules."""

from __future__ import annotations

from .dense import FALSE, IS_UNTIED, NO_BIAS, TRUE, UNTIED, _for_some_layer, _head_dim, _heads
from .rules import PLAIN, SCALED, Rope, Rules

SILU = {"hidden_act": ("silu", "swish")}
_LATENT = Rope(replaceable=False, scales_attention=True)

MIXTURES: dict[str, Rules] = {
    "afmoe": Rules(
        window="typed",
        native_window="layer_types",
        # mlx-lm knows these four keys, transformers computes what they are by default.
        only=SILU
        | NO_BIAS
        | {"n_group": (1,), "topk_group": (1,), "route_norm": TRUE, "score_func": ("sigmoid",)},
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
        harmless={"norm_topk_prob": "transformers ignores it"},
    ),
    "deepseek_v3": Rules(_LATENT, only=SILU | UNTIED | {"rope_interleave": TRUE}),
    "deepseek_v32": Rules(_LATENT, only=SILU | UNTIED),
    "dots1": Rules(window="after", only=SILU | NO_BIAS),
    "ernie4_5_moe": Rules(
        Rope(kinds=PLAIN, default_theta=500000.0),
        only=SILU | {"use_bias": FALSE, "moe_norm_min": (1e-12,)},
    ),
    "bailing_hybrid": Rules(None, unread=("linear_num_heads", "kda_lower_bound")),
    "exaone_moe": Rules(
        window="typed",
        native_window="layer_types",
        only=SILU | {"sliding_window": _for_some_layer},
    ),
    "glm4_moe": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_share=0.5, kinds=PLAIN),
        absent={"rope_scaling": None, "head_dim": _heads},
        only=SILU | UNTIED,
    ),
    "glm4_moe_lite": Rules(_LATENT, only=SILU | {"rope_interleave": TRUE}),
    "step3p5": Rules(None, unread=("n_routed_experts", "rope_parameters")),
    "glm_moe_dsa": Rules(Rope(reads_new=True, replaceable=False), only=SILU | UNTIED),
    "gpt_oss": Rules(
        Rope(default_theta=150000.0, kinds=SCALED),
        window="alternating",
        native_window="layer_types",
        only=UNTIED | {"attention_bias": TRUE, "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
    "granitemoe": Rules(absent=IS_UNTIED, only=SILU),
    "kimi_linear": Rules(Rope(reads_new=True, replaceable=False), only=SILU),
    "laguna": Rules(
        Rope(reads_new=True, replaceable=False, kinds=SCALED | {"dynamic"}),
        window="typed",
        native_window="layer_types",
        only=SILU,
    ),
    "lfm2_moe": Rules(Rope(kinds=PLAIN, default_theta=1000000.0)),
    "llama4": Rules(
        Rope(default_theta=500000.0), only=SILU | NO_BIAS, harmless={"moe_layers": "follows a step"}
    ),
    "longcat_flash": Rules(_LATENT, only=SILU | UNTIED),
    "mellum": Rules(
        Rope(reads_new=True, replaceable=False, kinds=SCALED - {"linear"} | {"dynamic"}),
        window="typed",
        native_window="layer_types",
        names={"num_experts": "num_local_experts"},
        only=SILU | NO_BIAS,
    ),
    "minimax": Rules(
        Rope(kinds=PLAIN, default_theta=1000000.0, replaceable=False),
        only=SILU | {"sliding_window": (None,)},
    ),
    "mistral4": Rules(Rope(reads_new=True, replaceable=False), only=SILU),
    "mixtral": Rules(
        Rope(kinds=PLAIN, default_theta=1000000.0),
        window="every",
        only=SILU | {"head_dim": _head_dim},
    ),
    "nemotron_h": Rules(None),
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
        },
    ),
    "qwen3_moe": Rules(
        Rope(kinds=PLAIN),
        window="switched",
        names={"num_experts": "num_local_experts"},
        absent={"head_dim": _heads},
        only=SILU | NO_BIAS,
    ),
    "qwen3_next": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_share=0.25), only=SILU
    ),
    "solar_open": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_theta=1000000.0, kinds=PLAIN),
        absent={"intermediate_size": 0, "first_k_dense_replace": 0},
        only=SILU,
    ),
}

"""Rules of dense families. Sources: their configs in transformers 5.24, mlx-lm 0.32.2's modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_flash.errors import ModelError

from .checks import (
    equal_heads,
    for_some_layer,
    four_times,
    reaches_everything,
    same_as,
    shares_width,
)
from .rules import LINEAR, PLAIN, Rope, Rules

FALSE = (False,)
TRUE = (True,)
UNTIED = {"tie_word_embeddings": FALSE}
TIED = {"tie_word_embeddings": TRUE}
IS_UNTIED = {"tie_word_embeddings": False}  # what transformers takes where the config says nothing
NO_BIAS = {"attention_bias": FALSE}
CAUSAL = {"use_bidirectional_attention": FALSE}


def _inner_width(config: Mapping[str, Any]) -> dict[str, Any]:
    """GPT's width of the FFN, which may be null."""
    return {"n_inner": config.get("n_inner") or 4 * (config.get("n_embd") or 0)}


_LLAMA = Rules(absent=IS_UNTIED)
_PLAIN = Rope(kinds=PLAIN)


def granite_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Layers and positions under the names that Granite's hybrids were published with."""
    old = {"linear_attention": "mamba", "full_attention": "attention"}
    kinds = config.get("layer_types")
    written = {"layer_types": [old.get(k, k) for k in kinds]} if isinstance(kinds, list) else {}
    if config.get("position_embedding_type") != "rope":  # null means none to transformers
        written["position_embedding_type"] = "nope"
    return written


def one_per_kind(config: Mapping[str, Any]) -> dict[str, Any]:
    """What layers without a window have of their own, of Gemma 4's settings per layer.

    Raises:
        ModelError: a layer has what mlx-lm cannot give it.
    """
    own = config.get("per_layer_config") or {}
    kinds = config.get("layer_types") or []
    full = {i for i, kind in enumerate(kinds) if kind == "full_attention"}
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    found: dict[str, Any] = {}
    for key, new in names.items():
        values = {int(i): entry[key] for i, entry in own.items() if key in entry}
        if values and (values.keys() != full or len(set(values.values())) > 1):
            raise ModelError(
                f"per_layer_config of this {config.get('model_type')} model gives layers "
                f"{sorted(values)!r:.80} a {key} of their own, but mlx-lm knows one for all layers "
                "without a window, so its output would be wrong"
            )
        if values:
            found[new] = next(iter(values.values()))
    if "per_layer_config" in config and config.get("head_dim"):
        found.setdefault("global_head_dim", config["head_dim"])
    if strange := sorted({key for entry in own.values() for key in entry} - names.keys()):
        raise ModelError(
            f"per_layer_config of this {config.get('model_type')} model has {strange[0]}, which "
            "mlx-lm cannot give single layers, so its output would be wrong"
        )
    return found


GEMMA4_TEXT = Rules(
    Rope(reads_new=True, replaceable=False),
    window="typed",
    native_window="layer_types",
    absent={"final_logit_softcapping": None, "use_double_wide_mlp": False}
    | {"num_kv_shared_layers": 0},
    only=NO_BIAS | CAUSAL,
    translate=one_per_kind,
    written=("per_layer_config",),
)


DENSE: dict[str, Rules] = {
    **dict.fromkeys(("llama", "bypass_llama", "sparsellama", "iquestcoder"), _LLAMA),
    "mistral": Rules(
        window="every", absent=IS_UNTIED, harmless={"layer_types": "transformers ignores it"}
    ),
    "apertus": Rules(
        Rope(default_theta=12000000.0),
        absent={
            "mlp_bias": False,
            "post_norm": False,
            "qk_norm": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "rope_theta": 12000000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        only=NO_BIAS,
    ),
    "cohere": Rules(Rope(kinds=PLAIN, default_theta=500000.0), only=TIED),
    "cohere2": Rules(
        _PLAIN, window="fourth", native_window="pattern", only=TIED | {"head_dim": shares_width}
    ),
    "ernie4_5": Rules(
        Rope(kinds=PLAIN, default_theta=500000.0), absent={"tie_word_embeddings": True}
    ),
    "exaone": Rules(
        Rope(default_theta=500000.0),
        names={
            "num_layers": "num_hidden_layers",
            "layer_norm_epsilon": "rms_norm_eps",
            "activation_function": "hidden_act",
        },
        absent=IS_UNTIED,
    ),
    "exaone4": Rules(
        window="fourth",
        native_window="letters",
        absent={"head_dim": equal_heads, "rope_scaling": None, "sliding_window": 4096}
        | {"sliding_window_pattern": 4},
        only={"sliding_window": for_some_layer},
    ),
    "falcon_h1": Rules(
        absent=IS_UNTIED | {"head_dim": equal_heads},
        only={"time_step_limit": ([0.0, float("inf")], [0.001, 100.0])},  # as good as the same
        harmless={"mamba_expand": "mamba_d_ssm says it"},
    ),
    "gemma": Rules(_PLAIN, only=TIED | NO_BIAS | CAUSAL),
    "gemma2": Rules(_PLAIN, window="alternating", only=TIED | NO_BIAS | CAUSAL),
    "gemma3_text": Rules(
        Rope(default_theta=1000000.0, local="rope_local_base_freq"),
        window="sixth",
        native_window="pattern",
        only=NO_BIAS
        | CAUSAL
        | {"final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)},
        harmless={"tie_word_embeddings": "whether there is a head tells it"},
    ),
    "gemma4_text": GEMMA4_TEXT,
    "glm": Rules(
        Rope(kinds=PLAIN, uses_share=True, default_share=0.5),
        absent=IS_UNTIED | {"attention_bias": True},
    ),
    "glm4": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_share=0.5, kinds=PLAIN),
        only=UNTIED,
    ),
    "gpt2": Rules(
        None,
        names={"n_ctx": "n_positions"},
        only={
            "n_inner": four_times("n_embd"),
            "scale_attn_weights": TRUE,
            "add_cross_attention": FALSE,
            "tie_word_embeddings": TRUE,
        },
        harmless={"reorder_and_upcast_attn": "the same sums in float32"},
    ),
    "gpt_bigcode": Rules(
        None,
        translate=_inner_width,
        only={"multi_query": TRUE, "scale_attn_weights": TRUE, "add_cross_attention": FALSE},
    ),
    "gpt_neox": Rules(
        Rope(
            theta="rotary_emb_base",
            share="rotary_pct",
            uses_share=True,
            default_share=0.25,
            kinds=PLAIN,
        ),
        only=UNTIED | {"attention_bias": TRUE, "intermediate_size": four_times("hidden_size")},
    ),
    "gptj": Rules(None, only=UNTIED | {"n_inner": four_times("n_embd")}),
    "granite": Rules(absent=IS_UNTIED),
    "granitemoehybrid": Rules(
        _PLAIN,
        absent=IS_UNTIED,
        only={"mamba_n_groups": (1,)},
        harmless={"mamba_expand": "mamba_n_heads and mamba_d_head say it"},
        translate=granite_names,
    ),
    "helium": Rules(
        Rope(kinds=PLAIN, default_theta=100000.0), only=UNTIED | {"head_dim": shares_width}
    ),
    "hunyuan_v1_dense": Rules(Rope(spelling="type", kinds=PLAIN | {"dynamic"}, replaceable=False)),
    "internlm3": Rules(
        Rope(kinds=PLAIN, spelling="rope_type"),
        names={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
        only={"head_dim": shares_width},
    ),
    "jamba": Rules(None, absent=IS_UNTIED),
    "lfm2": Rules(
        Rope(kinds=PLAIN, default_theta=1000000.0),
        names={"block_dim": "hidden_size"},
        only=TIED,
    ),
    "llama4_text": Rules(
        Rope(kinds=PLAIN, default_theta=500000.0, replaceable=False),
        absent=IS_UNTIED,
        only=NO_BIAS
        | {"attn_temperature_tuning": FALSE, "attention_chunk_size": reaches_everything}
        | {"moe_layers": ([],)},
        harmless={
            "attn_scale": "of attn_temperature_tuning",
            "floor_scale": "of attn_temperature_tuning",
            "interleave_moe_layer_step": "no layer has experts",
            "intermediate_size": "no layer has experts",
            "layer_types": "no_rope_layers and attention_chunk_size say it",
            "no_rope_layer_interval": "no_rope_layers says it",
            "num_experts_per_tok": "no layer has experts",
            "num_local_experts": "no layer has experts",
        },
    ),
    "minicpm3": Rules(
        Rope(kinds=PLAIN | {"longrope"}, replaceable=False),
        only={"mlp_bias": FALSE, "v_head_dim": shares_width},
        harmless={
            "head_dim": "qk_rope_head_dim says it",
            "num_key_value_heads": "every head has its own",
            "qk_head_dim": "its two parts say it",
        },
    ),
    "ministral3": Rules(
        Rope(reads_new=True, replaceable=False), only={"sliding_window": reaches_everything}
    ),
    "muse_glimmer": Rules(
        Rope(reads_new=True), window="typed", native_window="layer_types", only=NO_BIAS
    ),
    "nanochat": Rules(
        Rope(kinds=PLAIN, replaceable=False),
        only=UNTIED | NO_BIAS | {"final_logit_softcapping": (15.0,), "rms_norm_eps": (1e-5,)},
    ),
    "nemotron": Rules(
        Rope(
            share="partial_rotary_factor",
            built_in_share=0.5,
            uses_share=True,
            default_share=0.5,
            kinds=LINEAR,
            spelling="type",
        ),
        absent=IS_UNTIED,
    ),
    "olmo2": Rules(absent=IS_UNTIED),
    "olmo3": Rules(
        Rope(default_theta=500000.0, local="rope_theta"),
        window="fourth",
        native_window="layer_types",
        absent=IS_UNTIED,
    ),
    "olmo_hybrid": Rules(Rope(reads_new=True, kinds=PLAIN)),
    "phi": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_share=0.5, kinds=PLAIN),
        only=UNTIED | {"qk_layernorm": FALSE},
    ),
    "phi3": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, kinds=PLAIN, spelling="type"),
        window="every",
        absent=IS_UNTIED,
    ),
    "qwen2": Rules(window="qwen", absent=IS_UNTIED),
    "qwen3": Rules(window="qwen", absent=IS_UNTIED, only=NO_BIAS),
    "recurrent_gemma": Rules(
        Rope(kinds=PLAIN, uses_share=True, built_in_share=0.5, default_share=0.5),
        only=TIED
        | NO_BIAS
        | {"conv1d_width": (4,), "head_dim": shares_width, "lru_width": same_as("hidden_size")}
        | {"num_key_value_heads": (1,)},
    ),
    "seed_oss": Rules(absent=IS_UNTIED | {"attention_bias": True}),
    "smollm3": Rules(
        Rope(default_theta=2000000.0), window="without_rope", native_window="layer_types"
    ),
    "stablelm": Rules(
        Rope(share="partial_rotary_factor", uses_share=True, default_share=0.25, kinds=PLAIN),
        only=UNTIED,
    ),
    "starcoder2": Rules(
        _PLAIN, window="every", only={"use_bias": TRUE}, absent={"tie_word_embeddings": True}
    ),
}

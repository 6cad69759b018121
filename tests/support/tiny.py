"""Tiny random checkpoints of every family, laid out the way Hugging Face ships them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_flash.models.registry import get_classes

VOCAB = 300
SPECIAL = ("<s>", "</s>", "<pad>")
MERGES = "t h|i n|a n|e r|o n|th e|in g|o r|e n|an d"

# Lists with one entry per layer: repeated, then cut, to the number of layers asked for.
PER_LAYER = ("block_configs", "block_types", "ffn_multipliers", "layer_types", "no_rope_layers")
PER_LAYER += ("num_kv_heads", "num_query_heads")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_transformer_layers")


def _llama(**other: Any) -> dict[str, Any]:
    """A config under llama's names; a key set to None is left out."""
    base = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
    return {k: v for k, v in (base | other).items() if v is not None}


def _gpt(**other: Any) -> dict[str, Any]:
    """A config under GPT-2's names."""
    return {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 512,
        "n_ctx": 512,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    } | other


def _gemma(**other: Any) -> dict[str, Any]:
    act = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}
    return _llama(**act | {"tie_word_embeddings": True, "query_pre_attn_scalar": 16} | other)


_WINDOW = {"sliding_window": 32}
_MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1}
_MAMBA |= {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_conv_bias": True}
_MAMBA |= {"mamba_proj_bias": False}
_GRANITE = {"logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0}
_GRANITE |= {"residual_multiplier": 0.5, "attention_bias": False, "mlp_bias": False}
_MINICPM = {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2}
_LONGROPE = {"type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}

_REFINED_WEB = {
    "alibi": False,
    "bias": False,
    "hidden_size": 64,
    "n_head": 4,
    "n_layer": 4,
    "parallel_attn": True,
    "vocab_size": VOCAB,
}

TINY: dict[str, dict[str, Any]] = {
    "RefinedWeb": _REFINED_WEB | {"n_head_kv": 2},
    "RefinedWebModel": _REFINED_WEB | {"multi_query": True},
    "afm7": {
        "hidden_dim": 64,
        "hidden_dim_scale_factor": 2.5,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_kv_reuse_layers": 1,
        "num_layers": 4,
        "vocab_size": VOCAB,
    },
    "apertus": _llama(
        hidden_act="xielu", mlp_bias=False, attention_bias=False, post_norm=False, qk_norm=True
    ),
    "baichuan_m1": _llama(sliding_window_layers=[1, 3], conv_window=2, **_WINDOW),
    "bamboo": _llama(hidden_act="relu", **_WINDOW),
    "bypass_llama": _llama(hidden_act="fatrelu", hidden_act_param=0.1),
    "cohere": _llama(layer_norm_eps=1e-5, logit_scale=0.25, tie_word_embeddings=True),
    "cohere2": _llama(
        layer_norm_eps=1e-5,
        logit_scale=0.25,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
        **_WINDOW,
    ),
    "ernie4_5": _llama(use_bias=False),
    "exaone": _llama(
        hidden_act=None,
        activation_function="silu",
        num_hidden_layers=None,
        num_layers=4,
        layer_norm_epsilon=1e-5,
    ),
    "exaone4": _llama(
        layer_types=["sliding_attention", "full_attention"], sliding_window_pattern="LG", **_WINDOW
    )
    | {"rope_scaling": None},
    "falcon": {
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        "ffn_hidden_size": 160,
        "hidden_size": 64,
        "max_position_embeddings": 512,
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_kv_heads": 2,
        "parallel_attn": True,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
    },
    "falcon_h1": _llama(mamba_d_ssm=128, **_MAMBA),
    # No "conv_mixer" layer: transformers refuses the type, so the tokenizer would not load.
    "gear": _gemma(layer_types=["sliding_attention", "full_attention"], **_WINDOW),
    "gemma": _gemma(hidden_act="gelu"),
    "gemma2": _gemma(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": _gemma(sliding_window_pattern=2, **_WINDOW),
    "gemma4_text": _gemma(
        global_head_dim=32,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        layer_types=["sliding_attention", "full_attention"],
        **_WINDOW,
    ),
    "glm": _llama(attention_bias=True),
    "glm4": _llama(attention_bias=True, partial_rotary_factor=0.5),
    "gpt2": _gpt(activation_function="gelu_new"),
    "gpt_bigcode": _gpt(activation_function="gelu_pytorch_tanh", n_inner=160, multi_query=True),
    "gpt_neox": _llama(
        hidden_act="gelu",
        intermediate_size=256,
        layer_norm_eps=1e-5,
        num_key_value_heads=None,
        rotary_emb_base=10000,
        rotary_pct=0.5,
    ),
    "gptj": _gpt(activation_function="gelu_new", rotary_dim=8, tie_word_embeddings=False),
    "granite": _llama(**_GRANITE),
    "granitemoehybrid": _llama(
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        position_embedding_type="rope",
        shared_intermediate_size=160,
        **_GRANITE,
        **_MAMBA,
    ),
    "helium": _llama(attention_bias=False, mlp_bias=False),
    "hunyuan": _llama(
        attention_bias=False,
        cla_share_factor=2,
        moe_topk=1,
        num_experts=1,
        num_shared_expert=1,
        rope_scaling={"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
        tie_word_embeddings=True,
        use_cla=True,
        use_mixed_mlp_moe=False,
        use_qk_norm=True,
    ),
    "hunyuan_v1_dense": _llama(use_qk_norm=True),
    "internlm2": _llama(bias=False),
    "internlm3": _llama(bias=False, qkv_bias=False),
    "iquestcoder": _llama(),
    "iquestloopcoder": _llama(loop_num=2, loop_window_size=32),
    "jamba": _llama(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        num_experts=1,
        num_experts_per_tok=1,
        **_MAMBA,
    ),
    "lfm2": _llama(
        hidden_act=None,
        block_auto_adjust_ff_dim=False,
        block_dim=64,
        block_ff_dim=160,
        block_ffn_dim_multiplier=1.0,
        block_multiple_of=32,
        conv_L_cache=3,
        conv_bias=False,
        layer_types=["conv", "full_attention"],
        norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "lille-130m": {
        "block_size": 512,
        "layer_norm_eps": 1e-5,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 4,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
    },
    "llama": _llama(),
    "llama4_text": _llama(intermediate_size_mlp=160, no_rope_layers=[1, 1, 1, 0], use_qk_norm=True),
    "mimo": _llama(num_nextn_predict_layers=1),
    "minicpm": _llama(**_MINICPM),
    "minicpm3": _llama(
        rope_scaling=_LONGROPE | {"original_max_position_embeddings": 512}, **_MINICPM, **_MLA
    ),
    "ministral3": _llama(
        rope_parameters={
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 512,
        }
    ),
    "mistral": _llama(),
    "muse_glimmer": _llama(
        hidden_act=None,
        hidden_activation="silu",
        layer_types=["sliding_attention", "full_attention"],
        output_multiplier=1.0,
        **_WINDOW,
    ),
    "nanbeige": _llama(num_loops=2),
    "nanochat": _llama(hidden_act="relu2"),
    "nemotron": _llama(hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5),
    "nemotron-nas": _llama(
        block_configs=[
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 3.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 8.0}},
        ]
    ),
    "olmo2": _llama(),
    "olmo3": _llama(layer_types=["sliding_attention", "full_attention"], **_WINDOW),
    "olmo_hybrid": _llama(
        attention_bias=False,
        layer_types=["linear_attention", "full_attention"],
        linear_allow_neg_eigval=True,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=16,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_value_head_dim=16,
    ),
    "openelm": {
        "activation_fn_name": "swish",
        "ffn_dim_divisor": 16,
        "ffn_multipliers": [1.0, 2.5],
        "ffn_with_glu": True,
        "head_dim": 16,
        "model_dim": 64,
        "num_kv_heads": [1, 2],
        "num_query_heads": [2, 4],
        "num_transformer_layers": 4,
        "share_input_output_layers": True,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
    },
    "opt": {
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "ffn_dim": 160,
        "hidden_size": 64,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "word_embed_proj_dim": 64,
    },
    "persimmon": _llama(
        hidden_act="relu2",
        layer_norm_eps=1e-5,
        num_key_value_heads=None,
        partial_rotary_factor=0.5,
        qk_layernorm=True,
    ),
    "phi": _llama(hidden_act="gelu_new", layer_norm_eps=1e-5, partial_rotary_factor=0.5),
    "phi3": _llama(),
    "plamo": _llama(hidden_act=None, n_shared_head=2, num_key_value_heads=None),
    "plamo2": _llama(
        hidden_act=None,
        hidden_size_per_head=16,
        mamba_d_conv=4,
        mamba_d_state=16,
        mamba_enabled=True,
        mamba_num_heads=8,
        mamba_step=2,
        tie_word_embeddings=True,
    ),
    "plamo3": _llama(
        hidden_act=None, sliding_window_pattern=2, tie_word_embeddings=True, window_size=32
    ),
    "qwen": _llama(
        hidden_act=None,
        intermediate_size=320,
        kv_channels=16,
        layer_norm_epsilon=1e-5,
        no_bias=True,
        num_key_value_heads=None,
    ),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "recurrent_gemma": _gemma(
        attention_bias=False,
        attention_window_size=32,
        block_types=["recurrent", "attention"],
        conv1d_width=4,
        num_key_value_heads=1,
        intermediate_size=320,
        logits_soft_cap=30.0,
    ),
    "seed_oss": _llama(attention_bias=True, mlp_bias=False),
    "smollm3": _llama(no_rope_layers=[1, 1, 1, 0]),
    "sparsellama": _llama(hidden_act="fatrelu", hidden_act_param=0.1),
    "spark2_5": _llama(
        hidden_act="gelu",
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_theta": 10000.0},
            "full_attention": {"rope_theta": 100000.0},
        },
        **_WINDOW,
    ),
    "stablelm": _llama(layer_norm_eps=1e-5, partial_rotary_factor=0.5, use_qkv_bias=True),
    "starcoder2": _llama(
        hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-5, tie_word_embeddings=True
    ),
    "talkie": _llama(hidden_act=None, rms_norm_eps=1e-6, num_key_value_heads=None),
    "telechat3": _llama(),
    "xverse": _llama(),
    "youtu_llm": _llama(v_head_dim=16, **_MLA),
}


def config(model_type: str, layers: int = 4, **overrides: Any) -> dict[str, Any]:
    """A valid config.json of a tiny model; per-layer lists are fitted to ``layers``."""
    cfg = TINY[model_type] | overrides
    for key in PER_LAYER:
        if isinstance(cfg.get(key), list) and key not in overrides:
            cfg[key] = (cfg[key] * layers)[:layers]
    cfg |= {key: layers for key in LAYER_COUNTS if key in cfg and key not in overrides}
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return {"model_type": model_type} | tokens | cfg


def make_checkpoint(
    path: Path,
    model_type: str = "llama",
    dtype: str = "float32",
    seed: int = 0,
    layers: int = 4,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write config, weights and tokenizer of a tiny random model to ``path``; returns ``path``.

    Families that mix kinds of layers need at least 2 layers, gemma4_text 4.
    """
    path.mkdir(parents=True, exist_ok=True)
    cfg = config(model_type, layers, **overrides) | {"torch_dtype": dtype}
    weights = _shipped(model_type, cfg, _random_weights(cfg, seed))
    weights = {name: w.astype(getattr(mx, dtype)) for name, w in weights.items()}
    _write_weights(path, weights, shards)
    write_tokenizer(path, cfg["vocab_size"])
    _write_json(path / "config.json", cfg)
    return path


def _random_weights(cfg: dict[str, Any], seed: int) -> dict[str, mx.array]:
    """Random float32 parameters of mlx-lm's model, under its names."""
    model_class, args_class = get_classes(cfg)
    model = model_class(args_class.from_dict(json.loads(json.dumps(cfg))))
    random = np.random.default_rng(seed)
    params = sorted(tree_flatten(model.parameters()), key=lambda item: item[0])
    return {name: _random_parameter(name, value, random) for name, value in params}


def _random_parameter(name: str, value: mx.array, random: np.random.Generator) -> mx.array:
    noise = mx.array(random.standard_normal(value.shape, dtype=np.float32))
    if name.endswith(".bias"):
        return 0.1 * noise
    if name.endswith(("norm.weight", "ln_f.weight")) and not any(
        part.isdigit() for part in name.split(".")
    ):
        # The last norm flips some signs: else a tied head answers every token with itself.
        return mx.where(noise > 0, 0.7, -2.2) + 0.1 * noise
    is_matrix = value.ndim > 1 and (name.endswith("weight") or name == "lm_head")
    if is_matrix and any(part in name for part in ("emb", "wte", "wpe")):
        return 0.5 * noise
    if is_matrix:
        return noise / prod(value.shape[1:]) ** 0.5
    return value.astype(mx.float32) + 0.1 * noise  # norms, gains: near what they start from


def _shipped(
    model_type: str, cfg: dict[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """The weights in the layout of the Hub, where that is not mlx-lm's own."""
    if cfg.get("tie_word_embeddings"):
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    if model_type == "gpt2":  # linear layers are stored [in, out], names have no prefix
        linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        weights = {k: v.T if k.endswith(linear) else v for k, v in weights.items()}
        return {k.removeprefix("model."): v for k, v in weights.items()}
    if model_type == "gptj":
        return {k.replace("model.", "transformer."): v for k, v in weights.items()}
    if model_type == "opt":  # the FFN lies in the layer itself
        return {k.replace(".mlp.", "."): v for k, v in weights.items()}
    if model_type == "granitemoehybrid":  # gate and up in one matrix
        for i in range(cfg["num_hidden_layers"]):
            old, new = f"model.layers.{i}.mlp.", f"model.layers.{i}.shared_mlp."
            halves = [weights.pop(f"{old}{name}_proj.weight") for name in ("gate", "up")]
            weights[f"{new}input_linear.weight"] = mx.concatenate(halves)
            weights[f"{new}output_linear.weight"] = weights.pop(f"{old}down_proj.weight")
    return weights


def _write_weights(path: Path, weights: dict[str, mx.array], shards: int) -> None:
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "pt"})
        return
    names = list(weights)
    files = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[n * len(names) // shards : (n + 1) * len(names) // shards]
        mx.save_safetensors(str(path / file), {k: weights[k] for k in mine}, {"format": "pt"})
        files |= dict.fromkeys(mine, file)
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    _write_json(path / "model.safetensors.index.json", index)


def write_tokenizer(path: Path, size: int) -> None:
    """A byte-level BPE tokenizer with exactly ``size`` tokens."""
    merges = [tuple(pair.split()) for pair in MERGES.split("|")]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [*SPECIAL, *("".join(pair) for pair in merges)]
    tokens += [f"<reserved_{n}>" for n in range(size - len(tokens))]
    vocab = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    _write_json(path / "tokenizer_config.json", tokenizer_config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""What each GGUF architecture is in transformers: one entry each.

Knows: which model_type a file's architecture is, which of its keys are which of config.json's, what
a file leaves out because its architecture implies it, and how llama.cpp's converter changed the
tensors. Does not know: rope scaling (``rope``), names of tensors (``names``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_flash.errors import ModelError

from .keys import Keys

RMS = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
# Files may state both; which norms a model has is the architecture's.
EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
Names = Collection[str]


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files.

    Args:
        model_type, hf_class: in transformers.
        permuted: rows of Q and K lie in another order, as llama.cpp's rope wants them.
        norm_offset: what the converter added to the weights of norms.
        epsilon: the key of the norms' epsilon, and config.json's.
        has_head_dim: config.json has ``head_dim``; elsewhere heads share the hidden size.
        partial_rotary: config.json has ``partial_rotary_factor``; elsewhere heads turn whole.
        wide: activations go beyond float16's range, so that bfloat16 is the better default.
        sizes: whole numbers that a file must have: its key -> config.json's.
        scales: numbers that a file may have -> config.json's key.
        fixed: what config.json says in every model of the architecture.
        implied: keys of a file -> the value that is computed anyway.
        yarn: what every model's yarn scaling says besides.
        derive: what else config.json says, from the keys, the config so far, the tensors' names.
    """

    model_type: str
    hf_class: str
    permuted: bool = False
    norm_offset: float = 0.0
    epsilon: tuple[str, str] = RMS
    has_head_dim: bool = False
    partial_rotary: bool = False
    wide: bool = False
    sizes: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    implied: Mapping[str, Any] = field(default_factory=dict)
    yarn: Mapping[str, Any] = field(default_factory=dict)
    derive: Callable[[Keys, Mapping[str, Any], Names], Mapping[str, Any]] | None = None


def _biases(_keys: Keys, _config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Biases are told by their tensors; without one, transformers' default (none) is left out."""
    wanted = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}
    return {key: True for key, tensor in wanted.items() if tensor in names}


def _qwen2_moe(keys: Keys, config: Mapping[str, Any], _names: Names) -> dict[str, Any]:
    ffn = config["intermediate_size"]
    expert = max(1, ffn // config["num_experts_per_tok"])  # where an old file does not say it
    shared = keys.size("expert_shared_feed_forward_length", ffn)
    return {
        "moe_intermediate_size": keys.size("expert_feed_forward_length", expert),
        "shared_expert_intermediate_size": shared,
    }


def _gemma2(keys: Keys, config: Mapping[str, Any], _names: Names) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _query_scalar(config, layers=46),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "sliding_window": keys.size("attention.sliding_window", 4096),
    }


def _gemma3(keys: Keys, config: Mapping[str, Any], _names: Names) -> dict[str, Any]:
    found: dict[str, Any] = {
        "query_pre_attn_scalar": _query_scalar(config, layers=62),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": 1,
    }
    if keys.get("attention.sliding_window"):
        found["sliding_window"] = keys.size("attention.sliding_window")
        found["sliding_window_pattern"] = _period(keys, 6)
    return found


def _query_scalar(config: Mapping[str, Any], layers: int) -> float:
    """Queries are divided by its root: no key of a file, but the largest model's is another."""
    if config["num_hidden_layers"] == layers:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _period(keys: Keys, default: int) -> int:
    """Every how many layers one sees everything; files say that number or a flag a layer."""
    pattern = keys.get("attention.sliding_window_pattern", default)
    if not isinstance(pattern, list):
        return keys.size("attention.sliding_window_pattern", default)
    period = pattern.index(False) + 1 if False in pattern else 0
    if not period or pattern != [(i + 1) % period != 0 for i in range(len(pattern))]:
        raise ModelError(
            f"{keys.arch}.attention.sliding_window_pattern is {pattern!r:.60}; expected every n-th "
            "layer, counted from the n-th, without a window"
        )
    return period


def _gpt_oss(keys: Keys, config: Mapping[str, Any], _names: Names) -> dict[str, Any]:
    period = _period(keys, 2)
    layers = range(1, config["num_hidden_layers"] + 1)
    return {
        "intermediate_size": keys.size("expert_feed_forward_length", config["intermediate_size"]),
        "sliding_window": keys.size("attention.sliding_window", 128),
        "layer_types": [
            "sliding_attention" if layer % period else "full_attention" for layer in layers
        ],
    }


def _phi3(keys: Keys, _config: Mapping[str, Any], _names: Names) -> dict[str, Any]:
    names = {
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "sliding_window": "attention.sliding_window",  # 0 for none
    }
    return {key: keys.size(name) for key, name in names.items() if keys.get(name)}


def _cohere(keys: Keys, config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in names, **_biases(keys, config, names)}


def _stablelm(keys: Keys, _config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    # The key says True wherever config.json had been silent, which means False there.
    keys.get("use_parallel_residual")
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in names,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in names,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in names,
    }


_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_ALL_SPARSE = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_SOFTMAX = 1  # expert_gating_func

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", permuted=True, has_head_dim=True, derive=_biases
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", has_head_dim=True),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        sizes=_EXPERTS,
        fixed=_ALL_SPARSE | {"norm_topk_prob": False},
        implied={"expert_gating_func": _SOFTMAX},
        derive=_qwen2_moe,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        has_head_dim=True,
        sizes=_EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        fixed=_ALL_SPARSE | {"norm_topk_prob": True},
        implied={"expert_gating_func": _SOFTMAX, "expert_weights_norm": True},
    ),
    "gemma": Architecture(
        "gemma", "GemmaForCausalLM", norm_offset=1.0, has_head_dim=True, wide=True, fixed=_GELU
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        norm_offset=1.0,
        has_head_dim=True,
        wide=True,
        fixed=_GELU,
        derive=_gemma2,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        norm_offset=1.0,
        has_head_dim=True,
        wide=True,
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        derive=_gemma3,
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", partial_rotary=True, derive=_phi3),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        has_head_dim=True,
        wide=True,
        sizes=_LOCAL,
        fixed={"hidden_act": "silu", "attention_bias": True},
        yarn={"truncate": False},
        derive=_gpt_oss,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
        fixed={"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", has_head_dim=True),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        permuted=True,
        scales={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        derive=_biases,
    ),
    "command-r": Architecture(
        "cohere",
        "CohereForCausalLM",
        epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"),
        scales={"logit_scale": "logit_scale"},
        derive=_cohere,
    ),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"),
        partial_rotary=True,
        derive=_stablelm,
    ),
}
MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    permuted=True,
    sizes=_LOCAL,
    implied={"expert_gating_func": _SOFTMAX, "expert_weights_norm": True},
)
# general.type of files that are no model by themselves -> what they are.
NO_MODELS = {
    "adapter": "a LoRA adapter, which changes a model but is none; merge it into its base model "
    "(llama-export-lora) and convert that",
    "mmproj": "the vision or audio part of a model; convert the language model's own file",
    "vocab": "a vocabulary without a model; convert the file with the weights",
    "imatrix": "an importance matrix, made for quantising; convert the model that it is of",
}


def find_architecture(meta: Mapping[str, Any]) -> tuple[Architecture, Keys]:
    """The entry of a file's architecture, and the file's keys.

    Raises:
        ModelError: the file is no language model, or of an architecture without an entry.
    """
    kind, name = meta.get("general.type", "model"), meta.get("general.architecture")
    if kind != "model":
        what = NO_MODELS.get(kind if isinstance(kind, str) else "", "of a kind that is not known")
        raise ModelError(f"general.type is {kind!r:.60}: {what}")
    if name == "clip":
        raise ModelError(f"architecture 'clip' is {NO_MODELS['mmproj']}")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {name!r:.60}; GGUF files are supported for: {', '.join(ARCHITECTURES)}. "
            "Convert the Hugging Face checkpoint instead"
        )
    mixture = name == "llama" and meta.get("llama.expert_count", 0) != 0
    return MIXTRAL if mixture else ARCHITECTURES[name], Keys(meta, name)


def model_config(entry: Architecture, keys: Keys, names: Names, vocab_size: int) -> dict[str, Any]:
    """config.json as far as the header has it, but for rope scaling.

    Args:
        names: those of all tensors in the file.
        vocab_size: rows of the embedding.

    Raises:
        ModelError: a key is missing or of the wrong kind, or says what is not computed.
    """
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    kv_heads = keys.size("attention.head_count_kv", heads)
    config: dict[str, Any] = {
        "model_type": entry.model_type,
        "architectures": [entry.hf_class],
        "hidden_size": hidden,
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": keys.size("context_length"),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in names,
        entry.epsilon[1]: keys.number(entry.epsilon[0]),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        **entry.fixed,
    }
    config |= _head_sizes(entry, keys, hidden, heads, kv_heads)
    config |= {key: keys.size(name) for name, key in entry.sizes.items()}
    config |= {key: keys.number(name, 1.0) for name, key in entry.scales.items()}
    experts = keys.get("expert_feed_forward_length") if entry.sizes else None
    config["intermediate_size"] = keys.size("feed_forward_length", experts)
    for name in EPSILONS:
        keys.get(name)
    if entry.derive:
        config |= entry.derive(keys, config, names)
    if not keys.get("attention.causal", True):
        raise ModelError(
            f"settings that this version cannot honour: {keys.arch}.attention.causal = False"
        )
    return config


def _head_sizes(
    entry: Architecture, keys: Keys, hidden: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    """``head_dim`` and ``partial_rotary_factor``, where the architecture has them."""
    usual = max(1, hidden // heads)
    size = keys.size("attention.key_length", usual)
    value, rope = keys.size("attention.value_length", size), keys.size("rope.dimension_count", size)
    whole = rope == size or (entry.partial_rotary and rope < size)
    if heads % kv_heads or size % 2 or rope % 2 or value != size or not whole:
        raise ModelError(
            f"{heads} heads of size {size} for {kv_heads} key/value heads, values of size {value}, "
            f"rope over {rope}; expected whole groups of heads and one even size"
        )
    if not entry.has_head_dim and (size != usual or heads * usual != hidden):
        raise ModelError(
            f"{heads} heads of size {size} in a {entry.model_type} of width {hidden}; expected "
            f"that they share it equally"
        )
    found: dict[str, Any] = {}
    asked = keys.get("attention.key_length") is not None
    if entry.has_head_dim and (
        entry.model_type not in ("llama", "olmo2") or asked or heads * size != hidden
    ):
        found["head_dim"] = size
    if entry.partial_rotary:
        # Half a dimension more, so that rounding down gives back the number.
        exact = int(rope / size * size) == rope
        found["partial_rotary_factor"] = rope / size if exact else (rope + 0.5) / size
    return found

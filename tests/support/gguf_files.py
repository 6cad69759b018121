"""Writes GGUF files from Hugging Face weights and configs, laid out as llama.cpp's converter does.

The tests' other side: it follows llama.cpp's public converter (``conversion/*.py`` there, named at
each place) and its names of keys and tensors in the gguf package, never the reader of this package.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "fixtures" / "gguf"
# conversion/*.py: the class that registers each architecture names its MODEL_ARCH.
ARCHS = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt_oss": "gpt-oss",
    "starcoder2": "starcoder2",
    "olmo2": "olmo2",
    "granite": "granite",
    "cohere": "command-r",
    "stablelm": "stablelm",
}
PERMUTED = ("llama", "mixtral", "granite")  # llama.py: undo_permute; granite.py inherits it
GEMMAS = ("gemma", "gemma2", "gemma3_text")


@dataclass
class Golden:
    """One case of make_gguf_golden.py."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokens: list[int]
    logits: np.ndarray


def golden(name: str) -> Golden:
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    tokens, logits = tensors.pop("tokens").tolist(), tensors.pop("logits")
    weights = {key: value.astype(np.float32) for key, value in tensors.items()}
    return Golden(config, weights, tokens, logits)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.py, ``permute``: the halves of a head become pairs side by side."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def converted(config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under GGUF's names, with what the converter changes."""
    model = config["model_type"]
    arch = gguf.MODEL_ARCH[_member(ARCHS[model])]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    found = {}
    for name, data in _merged(config, weights).items():
        if model in PERMUTED and name.endswith(("q_proj.weight", "q_proj.bias")):
            data = permuted(data, config["num_attention_heads"])
        if model in PERMUTED and name.endswith(("k_proj.weight", "k_proj.bias")):
            data = permuted(data, config["num_key_value_heads"])
        if model in GEMMAS and name.endswith("norm.weight"):  # gemma.py
            data = data + 1
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, name
        found[target] = np.squeeze(data) if data.ndim > 1 else data  # base.py: shared_expert_gate
    return found | _rope_factors(config)


def _member(name: str) -> str:
    return next(a.name for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)


def _merged(config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts as one tensor a projection; gpt-oss' interleaved gate and up taken apart."""
    found = {}
    groups: dict[str, dict[int, np.ndarray]] = {}
    for name, data in weights.items():
        parts = name.split(".")
        if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
            at = parts.index("experts") + 1
            merged = ".".join(parts[:at] + parts[at + 1 :])
            groups.setdefault(merged, {})[int(parts[at])] = data
        elif "layernorm.norms." in name:  # stablelm.py: the norms of the heads stacked
            merged = name.split(".norms.")[0] + ".weight"
            groups.setdefault(merged, {})[int(parts[-2])] = data
        elif config["model_type"] == "gpt_oss":
            found |= _gpt_oss(name, data)
        else:
            found[name] = data
    for name, members in groups.items():
        # llama.py renames "block_sparse_moe.experts" of a layer to "feed_forward.experts".
        merged = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        stacked = np.stack([members[i] for i in range(len(members))])
        found[merged if "block_sparse_moe" in name else name] = stacked
    return found


def _gpt_oss(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    """gpt_oss.py: down transposed, gate the even and up the odd rows, sinks get a suffix."""
    if "sinks" in name:
        return {f"{name}.weight": data}
    bias = name.endswith("_bias")
    base = name.removesuffix("_bias")
    if base.endswith("experts.down_proj"):
        return {f"{base}.bias": data} if bias else {f"{base}.weight": data.swapaxes(-1, -2)}
    if base.endswith("experts.gate_up_proj"):
        rows = data if bias else data.swapaxes(-1, -2)
        suffix = "bias" if bias else "weight"
        halves = (rows[:, ::2], rows[:, 1::2])
        return {
            f"{base.replace('gate_up_proj', kind)}.{suffix}": half
            for kind, half in zip(("gate_proj", "up_proj"), halves, strict=True)
        }
    return {name: data}


def _rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """llama.py's ``generate_extra_tensors`` (llama3) and phi.py's (longrope)."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / size)
        turns = 8192 / wavelength  # what the converter takes, as no config has it at the top
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Keys without the architecture, as base.py's ``set_gguf_parameters`` and each class adds."""
    model = config["model_type"]
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    own = {
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": config.get("layer_norm_eps", config.get("norm_epsilon")),
        "expert_count": config.get("num_local_experts", config.get("num_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
    }
    keys |= {key: value for key, value in own.items() if value is not None}
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        betas = {k: rope[k] for k in ("beta_fast", "beta_slow") if k in rope}
        keys |= {f"rope.scaling.yarn_{k}": v for k, v in betas.items()}
    return keys | _of_class(model, config, rope)


def _of_class(model: str, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if model in PERMUTED:  # llama.py
        found = {"vocab_size": config["vocab_size"], "rope.dimension_count": size}
        scales = {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        }
        return found | {k: config[v] for k, v in scales.items() if v in config}  # granite.py
    if model in ("qwen2_moe", "qwen3_moe"):  # qwen.py
        lengths = {"expert_feed_forward_length": config["moe_intermediate_size"]}
        if shared := config.get("shared_expert_intermediate_size"):
            lengths["expert_shared_feed_forward_length"] = shared
        return lengths
    if model == "gemma2":  # gemma.py
        return {
            "attn_logit_softcapping": config["attn_logit_softcapping"],
            "final_logit_softcapping": config["final_logit_softcapping"],
            "attention.sliding_window": config["sliding_window"],
        }
    if model == "gemma3_text":
        local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
        return {
            "attention.sliding_window": config["sliding_window"],
            "rope.freq_base_swa": local,
        }
    if model == "phi3":  # phi.py
        original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        ratio = config["max_position_embeddings"] / original
        found = {
            "rope.scaling.original_context_length": original,
            "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * size),
            "attention.sliding_window": config.get("sliding_window") or 0,
        }
        if rope["rope_type"] == "longrope":
            found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(original))
        return found
    if model == "gpt_oss":  # gpt_oss.py
        return {
            "attention.sliding_window": config["sliding_window"],
            "expert_feed_forward_length": config["intermediate_size"],
        }
    if model == "cohere":  # command_r.py
        return {"logit_scale": config["logit_scale"], "rope.scaling.type": "none"}
    if model == "stablelm":  # stablelm.py: True where config.json is silent
        return {
            "rope.dimension_count": int(rope["partial_rotary_factor"] * size),
            "use_parallel_residual": config.get("use_parallel_residual", True),
        }
    return {}


def vocabulary(size: int) -> dict[str, Any]:
    """A byte-level vocabulary of that many tokens; too small to hold all bytes."""
    tokens = ["<unk>", "<s>", "</s>", "ab", *(chr(0x61 + i) for i in range(26))]
    tokens += [f"[PAD{i}]" for i in range(size - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (size - 3),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(
    path: Path,
    arch: str,
    meta: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kinds: dict[str, Kind] | None = None,
    **writer_options: Any,
) -> Path:
    """A file of these keys and tensors; ``kinds`` are the types of those that are quantised."""
    writer = gguf.GGUFWriter(path, arch, **writer_options)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in meta.items():
        adders[type(value)](key, value)
    for name, data in tensors.items():
        kind = (kinds or {}).get(name)
        data = np.ascontiguousarray(data)
        writer.add_tensor(name, data if kind is None else quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_golden(path: Path, name: str, **writer_options: Any) -> Golden:
    """Case ``name`` as a GGUF of float32; returns the case."""
    case = golden(name)
    arch = ARCHS[case.config["model_type"]]
    meta = {f"{arch}.{key}": value for key, value in metadata(case.config).items()}
    meta |= vocabulary(case.config["vocab_size"])
    write(path, arch, meta, converted(case.config, case.weights), **writer_options)
    return case

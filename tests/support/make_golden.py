"""Golden files for test_decoders.py: tiny random checkpoints and what transformers makes of them.

Needs its own environment; the tests need only what this writes.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tests/support/make_golden.py

One safetensors file per case in tests/golden: the weights under Hugging Face's names, float32;
"tokens.i" and "logits.i" for each sequence; config.json as text in the metadata. Everything is
random, biases and norms included, so that nothing is right because it is zero or one.

What transformers does not have is made of what it has: RefinedWeb is falcon under older names;
sparsellama, bamboo and minicpm are llama or mistral with another FFN or with scaled tensors, as
their papers (arXiv 2402.13516, 2406.05955, 2404.06395) describe them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "golden"
VOCAB = 96
LENGTHS = (27, 9)
MAX_BYTES = 150_000

OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
FALCON = {
    "model_type": "falcon",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
}
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
FALCON_RW |= {"num_attention_heads": 16}  # enough that slopes are no powers of two
PERSIMMON = {
    "model_type": "persimmon",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "relu2",
    "qk_layernorm": True,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "relu",
    "tie_word_embeddings": False,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 12}
FATRELU = {"hidden_act": "fatrelu", "hidden_act_param": 0.3}
MINICPM = LLAMA | {"model_type": "minicpm", "scale_emb": 3, "scale_depth": 1.4}
MINICPM |= {"dim_model_base": 12}
PHI = {
    "model_type": "phi",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "relu",
    "partial_rotary_factor": 0.5,
}
NEMOTRON = LLAMA | {"model_type": "nemotron", "hidden_act": "relu2", "rms_norm_eps": None}
NEMOTRON |= {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}
REFINED_WEB = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Configs as they stand on the hub (rope settings at the top level) and as transformers 5 writes
# them (in rope_parameters).
CASES = {
    "opt": OPT,
    "opt-350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt-galactica": OPT
    | {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
    },
    "opt-no-final-norm": OPT | {"_remove_final_layer_norm": True},
    "opt-bare": OPT | {"activation_function": "gelu_new"},  # names begin with "decoder."
    "opt-untied": OPT | {"word_embed_proj_dim": 16, "tie_word_embeddings": False},
    "falcon-7b": FALCON | {"num_kv_heads": 4, "ffn_hidden_size": None, "rope_theta": 10000.0},
    "falcon-40b": FALCON_40B,
    "falcon-11b": FALCON_40B
    | {"num_ln_in_parallel_attn": 1, "rope_theta": 500042.0, "tie_word_embeddings": False},
    "falcon-rw": FALCON_RW,
    "falcon-alibi-12-heads": FALCON | {"alibi": True, "hidden_size": 36, "num_attention_heads": 12},
    "falcon-all-keys": FALCON | {"multi_query": False},
    "falcon-sequential": FALCON | {"parallel_attn": False, "bias": True, "activation": "relu"},
    "falcon-bare": FALCON_40B  # names without "transformer."
    | {
        "activation": "relu",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    },
    "persimmon": PERSIMMON | {"partial_rotary_factor": 0.5, "rope_theta": 25000.0},
    "persimmon-v5": PERSIMMON
    | {
        "qk_layernorm": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 25000.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "persimmon-scaled": PERSIMMON
    | {
        "hidden_act": "relu",
        "rope_theta": 25000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
    },
    # Written later; a case's place here is its seed.
    "llama-relu": LLAMA | {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
    "llama-relu2": LLAMA
    | {
        "hidden_act": "relu2",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_theta": 700.0} | YARN,
    },
    "mistral-relu": MISTRAL | {"rope_theta": 500.0},
    "phi-relu": PHI | {"rope_theta": 500.0},
    "phi-v5": PHI
    | {
        "hidden_act": "relu2",
        "partial_rotary_factor": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 700.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "nemotron": NEMOTRON | {"rope_theta": 500.0},
    "sparsellama": LLAMA | FATRELU | {"model_type": "sparsellama"},
    "bamboo": MISTRAL | {"model_type": "bamboo"},
    "minicpm": MINICPM | {"hidden_act": "silu"},
    "minicpm-fatrelu": MINICPM | FATRELU | {"tie_word_embeddings": None},
    "refinedweb-7b": REFINED_WEB | {"model_type": "RefinedWebModel", "multi_query": True},
    "refinedweb-40b": REFINED_WEB | {"model_type": "RefinedWeb", "n_head_kv": 2},
    "falcon-llama3": FALCON
    | {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3,
    },
    "persimmon-yarn": PERSIMMON | {"rope_theta": 500.0, "rope_scaling": YARN},
}
BARE = {"opt-bare": "model.", "falcon-bare": "transformer."}  # prefixes to drop


LIKE = {"bamboo": "mistral", "minicpm": "llama", "sparsellama": "llama"}
LIKE |= {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}
OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
OLD_NAMES |= {"n_head_kv": "num_kv_heads"}


def known_to_transformers(config: dict) -> dict:
    """The config of the nearest model that transformers has."""
    known = {OLD_NAMES.get(k, k): v for k, v in json.loads(json.dumps(config)).items()}
    known["model_type"] = LIKE.get(config["model_type"], config["model_type"])
    if config["model_type"] == "RefinedWeb":
        known["new_decoder_architecture"] = True
    if config.get("hidden_act") == "fatrelu":
        known["hidden_act"] = "relu"
    if config["model_type"] == "minicpm":
        known.setdefault("tie_word_embeddings", True)
    return known


def change(model: torch.nn.Module, config: dict) -> None:
    """Make of a model of ``known_to_transformers`` one of the config."""
    if config.get("hidden_act") == "fatrelu":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Threshold(config["hidden_act_param"], 0.0)
    if config["model_type"] == "bamboo":
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda m, x, up: torch.relu(up))
    if config["model_type"] == "minicpm":
        branch = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
        logits = config["dim_model_base"] / config["hidden_size"]
        model.model.embed_tokens.register_forward_hook(lambda m, x, h: h * config["scale_emb"])
        model.model.norm.register_forward_hook(lambda m, x, h: h * logits)
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, x, h: h * branch)
            layer.self_attn.o_proj.register_forward_hook(lambda m, x, h: h * branch)


def predictors(config: dict) -> dict[str, torch.Tensor]:
    """What TurboSparse has in its checkpoint beside the model."""
    if config["model_type"] != "bamboo":
        return {}
    width, rows = config["hidden_size"], config["intermediate_size"]
    return {
        f"model.layers.{i}.mlp.predictor.{name}.weight": torch.randn(shape)
        for i in range(config["num_hidden_layers"])
        for name, shape in (("fc1", (4, width)), ("fc2", (rows, 4)))
    }


def model_of(config: dict) -> torch.nn.Module:
    """A causal model of a config with every parameter random."""
    known = transformers.AutoConfig.for_model(**known_to_transformers(config))
    model = transformers.AutoModelForCausalLM.from_config(known, dtype=torch.float32).eval()
    change(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[1]))
    return model


def make(name: str, config: dict, seed: int) -> Path:
    """Write one case; returns its file."""
    torch.manual_seed(seed)
    config = {k: v for k, v in config.items() if v is not None}
    model = model_of(config)
    tied = model.config.tie_word_embeddings
    weights = {
        key.removeprefix(BARE.get(name, "")): value.contiguous()
        for key, value in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    cases = {}
    for i, length in enumerate(LENGTHS):
        tokens = torch.randint(3, VOCAB, (length,))
        with torch.no_grad():
            cases[f"logits.{i}"] = model(tokens[None]).logits[0].contiguous()
        cases[f"tokens.{i}"] = tokens.to(torch.int32)
        assert cases[f"logits.{i}"].std() > 0.5
    path = GOLDEN / f"{name}.safetensors"
    weights |= predictors(config)
    save_file(weights | cases, path, metadata={"config": json.dumps(config)})
    assert path.stat().st_size < MAX_BYTES, f"{path} has {path.stat().st_size} bytes"
    return path


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, config) in enumerate(CASES.items()):
        path = make(name, config, seed)
        print(f"{path.stat().st_size:7d} bytes  {name}")  # noqa: T201


if __name__ == "__main__":
    main()

"""One key of a config changed at a time: logits are transformers', or the config is refused.

Families are those whose tiny config, as transformers saves it, makes the model that transformers
makes. Needs torch.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import tiny, tiny_mixtures
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlx_flash.conversion.huggingface import HFCheckpoint
from mlx_flash.errors import FlashError
from mlx_flash.model_directory.config import _untagged
from mlx_flash.models.registry import make_model

torch = pytest.importorskip("torch", reason="torch is needed to compare with transformers")

LENGTH = 40
LONGEST = 64  # positions of a model; windows and original lengths are shorter than the text
TOKENS = (np.arange(LENGTH) * 7 + 3) % 250
# What cannot be changed alone, or is a token.
FIXED = {
    "head_dim", "hidden_size", "intermediate_size", "is_encoder_decoder", "layer_types",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size",
    "rope_parameters", "max_position_embeddings", "transformers_version", "dtype", "architectures",
    "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "use_cache", "_name_or_path",
}  # fmt: skip
SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}
YARN = {"attention_factor": 1.3, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}
YARN |= {"mscale": 0.7, "mscale_all_dim": 0.7}


def known(model_type: str) -> bool:
    """Whether transformers has a config class of this type."""
    return model_type in CONFIG_MAPPING


# Without these even transformers' own defaults are not what mlx-lm computes.
NEEDED = {
    "olmo3": {"rope_theta": 500000.0},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
}


def base_config(model_type: str) -> dict[str, Any]:
    """The tiny config of a family in transformers' own words."""
    source = tiny if model_type in tiny.TINY else tiny_mixtures
    config = source.config(model_type, **NEEDED.get(model_type, {}))
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    config |= {
        key: LONGEST for key in ("max_position_embeddings", "n_positions", "n_ctx") if key in config
    }
    return as_saved(config)


def as_saved(config: dict[str, Any]) -> dict[str, Any]:
    """A config through transformers' class, as it would be written."""
    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    return json.loads(made.to_json_string(use_diff=False), object_hook=_untagged)


def changes(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is changed, the changed keys), one setting at a time."""
    tokens = tuple(key for key in config if key.endswith(("_token_id", "_token_index")))
    for key, value in config.items():
        if key not in FIXED and key not in tokens:
            for new in _others(value):
                yield f"{key}={new!r}", {key: new}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        for name, new in _ropes(rope, config):
            yield f"rope {name}", {"rope_parameters": new}
    if "sliding_window" in config or config.get("layer_types"):
        yield from _windows(config)


def _others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value] if value else [1, 2]
    if isinstance(value, float):
        return [value * 1.7 if value else 0.5]
    if value is None:
        return [True, 0.5, 3.0, 4]
    if value in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu2", "xielu"):
        return [other for other in ("relu", "gelu", "gelu_pytorch_tanh", "silu") if other != value]
    return []


def _ropes(rope: dict[str, Any], config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    flat = next((v for v in rope.values() if isinstance(v, dict)), rope)
    nested = flat is not rope
    head = config.get("qk_rope_head_dim") or config.get("head_dim")
    head = head or config["hidden_size"] // config["num_attention_heads"]
    half = int(head * flat.get("partial_rotary_factor", 1.0)) // 2
    variants: dict[str, dict[str, Any]] = {"theta": {"rope_theta": 500.0}}
    variants["share"] = {"partial_rotary_factor": 0.75}
    variants |= {kind: {"rope_type": kind} | more for kind, more in SCALED.items()}
    for key, value in YARN.items():
        variants[f"yarn {key}"] = variants["yarn"] | {key: value}
    variants["yarn mscales"] = variants["yarn"] | {"mscale": 0.9, "mscale_all_dim": 0.5}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    long |= {"short_factor": [1.0 + i / 9 for i in range(half)]}
    long |= {"long_factor": [1.5 + i / 3 for i in range(half)]}
    variants["longrope"] = long
    variants["longrope short"] = long | {"original_max_position_embeddings": 50}
    variants["longrope factor"] = long | {"factor": 3.0}
    variants["longrope attention"] = long | {"attention_factor": 1.2}
    variants["proportional"] = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
    for name, more in variants.items():
        if not nested:
            yield name, rope | more
            continue
        yield f"{name} everywhere", {k: v | more for k, v in rope.items()}
        for layer in rope:
            yield f"{name} in {layer}", rope | {layer: rope[layer] | more}


def _windows(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    count, on = config.get("num_hidden_layers", 0), {"sliding_window": 8}
    if "use_sliding_window" in config:
        on["use_sliding_window"] = True
    kinds = {"sliding_attention", "full_attention"}
    yield "window", on
    if config.get("layer_types") and set(config["layer_types"]) <= kinds:
        for name, letters in {"all": "s", "none": "f", "fs": "fs", "sff": "sff"}.items():
            full = (letters * count)[:count]
            types = ["sliding_attention" if c == "s" else "full_attention" for c in full]
            yield f"window in layers {name}", on | {"layer_types": types}


def save_model(path: Path, config: dict[str, Any], seed: int = 0) -> np.ndarray:
    """Save a random model of a config, as transformers does; its logits [LENGTH, vocabulary].

    Weights are large enough that every setting shows.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    # Two ways of ALiBi that differ: the default one counts.
    attention = None if config["model_type"] == "falcon" else "eager"
    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(
                    0, 1.0 if "embed" in name or "wte" in name else weight.shape[-1] ** -0.5
                )
            elif "norm" in name or "ln_" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
        logits = model(torch.tensor(TOKENS)[None], use_cache=False).logits[0].numpy()
    model.save_pretrained(path)
    return logits


def our_logits(path: Path) -> np.ndarray:
    """Logits [LENGTH, vocabulary] of a saved model as this package runs it."""
    checkpoint = HFCheckpoint(path)
    model = make_model(checkpoint.config)
    if hasattr(model, "sanitize"):  # which may tie the head
        model.sanitize({name: mx.zeros(shape) for name, shape in checkpoint.shapes.items()})
    model.load_weights([(name, checkpoint.take(name)) for name in checkpoint.shapes])
    return np.array(model(mx.array(TOKENS)[None]).astype(mx.float32))[0]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of logits, in units of the largest logit if that is above 1."""
    return float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))


TOLERANCE = 1e-4
# Families whose tiny config makes no model that both programs can be asked about.
APART = {
    "bailing_hybrid": "another model in mlx-lm under that name",
    "deepseek_v32": "the tokens that its indexer picks differ from 16 on",
    "glm_moe_dsa": "the same",
    "kimi_linear": "transformers' names of tensors are refused",
    "llama4_text": "the same",
    "mimo_v2_flash": "the same",
    "minicpm3": "transformers cannot make the tiny config",
    "minimax": "MiniMax-M2 in mlx-lm, another model in transformers",
    "nanochat": "transformers' names of tensors are refused",
    "olmo_hybrid": "transformers' names of tensors are refused",
    "recurrent_gemma": "the tiny config's keys are not transformers'",
    "solar_open": "the tiny config's first layer is dense",
    "longcat_flash": "transformers cannot make the tiny config",
    "step3p5": "is refused",
}
# transformers looks up the long factors and then rotates by the short ones; the published code of
# Phi-3.5-MoE does not.
OTHERWISE = {"phimoe": {"rope longrope", "rope longrope factor", "rope longrope attention"}}
SENSES = {"kimi_k25", "llama4", "minimax_m3_vl", "mistral3", "mistral4", "muse_glimmer"}
SENSES |= {"muse_spark", "qwen3_5_moe", "qwen3_vl_moe", "gemma4"}  # no text model alone
FAMILIES = sorted(
    name
    for name in {*tiny.TINY, *tiny_mixtures.TINY_MIXTURES}
    if known(name) and name not in APART and name not in SENSES
)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    from transformers import logging

    torch.set_num_threads(1)
    logging.set_verbosity(50)
    logging.disable_progress_bar()


def outcome(path, config):
    """ "equal", "refused", or "skipped" where transformers cannot make it; else what is wrong."""
    try:
        expected = save_model(path, config)
    except Exception:  # transformers', of a value that it cannot take
        return "skipped"
    if not np.isfinite(expected).all():
        return "skipped"
    try:
        found = our_logits(path)
    except FlashError:
        return "refused"
    finally:
        shutil.rmtree(path, ignore_errors=True)
    wrong = difference(found, expected)
    return "equal" if wrong < TOLERANCE else f"{wrong:.2g} off"


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_computed_or_refused(family, tmp_path):
    config = base_config(family)
    assert outcome(tmp_path / "base", config) == "equal"
    found = {}
    for number, (change, keys) in enumerate(changes(config)):
        try:
            changed = as_saved(config | keys)
        except Exception:  # transformers', of a value that it cannot take
            continue
        found[change] = outcome(tmp_path / str(number), changed)
    right = ("equal", "refused", "skipped")
    wrong = {
        k: v for k, v in found.items() if v not in right and k not in OTHERWISE.get(family, ())
    }
    assert wrong == {}
    assert Counter(found.values())["equal"] >= 9  # the table refuses no more than it has to

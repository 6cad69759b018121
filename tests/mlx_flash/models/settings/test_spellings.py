"""A config as transformers 5 writes it makes the same model as the one it was published with."""

from __future__ import annotations

import copy
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import tiny, tiny_mixtures
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlx_flash.errors import ModelError
from mlx_flash.model_directory.config import _untagged
from mlx_flash.models.registry import get_classes, make_model
from mlx_flash.models.settings.normalise import settle

TOKENS = (np.arange(24) * 7 + 3) % 250
THETA = 300000.0
# Families in which transformers' class is that of a model with more senses than text, has another
# model under the name, or leaves no other base; those whose module runs on a Mac only.
ELSEWHERE = {"muse_glimmer", "spark2_5"}
MAC = {"muse_spark"}
# The message says why: mlx-lm cannot read, or compute, what transformers means.
REFUSED = {
    "bailing_hybrid": "linear_num_heads",
    "llama4_text": "attn_temperature_tuning",
    "minimax": "layer_types",
    "olmo3": "one base of rotary positions",
    "phimoe": "attention_bias",
    "step3p5": "n_routed_experts",
}
FAMILIES = [("tiny", name) for name in tiny.TINY]
FAMILIES += [("tiny_mixtures", name) for name in tiny_mixtures.TINY_MIXTURES]
FAST = {"exaone", "gemma3_text", "gpt_neox", "llama", "phi", "mixtral", "glm4", "internlm2"}


def old_spelling(source: str, name: str) -> dict[str, Any]:
    config = copy.deepcopy((tiny if source == "tiny" else tiny_mixtures).config(name))
    text = config.get("text_config", config)
    if "rope_theta" in text:
        text["rope_theta"] = THETA
    return config


def new_spelling(config: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers would save; where it has no such family, the base of positions moved."""
    name = config["model_type"]
    if name in CONFIG_MAPPING and name not in ELSEWHERE:
        made = CONFIG_MAPPING[name].from_dict(copy.deepcopy(config))
        return json.loads(made.to_json_string(use_diff=False), object_hook=_untagged)
    if "rope_theta" not in config or "rope_parameters" in config:
        return None
    moved = {key: value for key, value in config.items() if key != "rope_theta"}
    return moved | {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)[None]).astype(mx.float32))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        pytest.param(
            *entry, marks=() if entry[1] in FAST else pytest.mark.whole, id="-".join(entry)
        )
        for entry in FAMILIES
    ],
)
def test_both_spellings_are_one_model(source, name):
    old = old_spelling(source, name)
    new = new_spelling(old)
    if new is None or name in MAC:
        pytest.skip("has one spelling, or runs on a Mac only")
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            settle(new)
        return
    settled = settle(new)
    assert settle(settled) == settled
    mx.random.seed(1)
    published = make_model(old)
    weights = tree_flatten(published.parameters())
    expected = logits(published)
    for config in (new, settled):
        model = make_model(config)
        model.load_weights(weights)
        assert np.abs(logits(model) - expected).max() < 1e-5
    # The arguments are those of the settled config, whoever reads the file.
    read, again = (get_classes(c)[1].from_dict(c) for c in (new, settled))
    assert vars(read) == vars(again)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "mistral", "stablelm", "phi3"])
def test_the_old_spelling_stays(name):
    config = tiny.config(name)
    if name == "gemma3_text":
        config["rope_local_base_freq"] = 10000.0
    before = copy.deepcopy(config)
    assert settle(config) is config
    assert config == before


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}


def test_scaled_positions_are_written_as_they_were_published():
    new = tiny.config("llama")
    theta = new.pop("rope_theta")
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": theta} | LLAMA3
    settled = settle(new)
    assert settled["rope_scaling"] == {"rope_type": "llama3"} | LLAMA3
    assert settled["rope_theta"] == theta
    assert "rope_parameters" not in settled


def test_an_attention_factor_is_written_as_the_mscale_that_gives_it():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = tiny.config("llama", rope_scaling=yarn | {"attention_factor": 1.3})
    settled = settle(config)
    rope = make_model(settled).layers[0].self_attn.rope
    assert rope.mscale == pytest.approx(1.3)
    assert settle(settled) == settled


def test_layer_types_become_the_pattern_that_mlx_lm_knows():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = tiny.config("gemma3_text", layer_types=kinds, sliding_window_pattern=None)
    assert settle(config)["sliding_window_pattern"] == 2
    assert settle(tiny.config("exaone4", layer_types=kinds, sliding_window_pattern=2))[
        "sliding_window_pattern"
    ] in ("LGLG", 2)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("llama", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type .* 'spiral'"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "'yarn', but its config has no factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor of rope"),
        ("llama", {"rope_scaling": 7}, "rope_scaling of this llama model is 7; exp"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters of this llama"),
        ("llama", {"rope_theta": "big"}, "rope_theta of this llama model is 'big'; exp"),
        ("llama", {"rope_scaling": YARN | {"factor": 0.5, "attention_factor": 2.0}}, "tor 0.5"),
        ("gemma3_text", {"rope_parameters": NESTED}, "mlx-lm scales no positions there"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping .* is 50.0"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "all but every n-th",
        ),
        ("gemma", {"attention_bias": True}, "attention_bias .* is True, which is not computed"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights .* expected True"),
        ("nanochat", {"final_logit_softcapping": 30.0}, "softcapping .* expected 15.0"),
        ("mistral", {"sliding_window": 2.5}, "sliding_window .* expected a number of tokens"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}
         | {"sliding_window": 8}, "layer_types .* names 1 layers; expected num_hidden_layers, 4"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(family, overrides, expected):
    with pytest.raises(ModelError, match=expected):
        settle(tiny.config(family, **overrides))


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv .* expected none"),
        ("mixtral", {"hidden_act": "relu"}, "hidden_act .* expected 'silu' or 'swish'"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("glm4_moe_lite", {"rope_interleave": False}, "rope_interleave .* expected True"),
        (
            "step3p5",
            {"rope_parameters": {"full_attention": {}}},
            "the config that the model was published with",
        ),
        (
            "laguna",
            {"rope_parameters": {"full_attention": {"rope_type": "proportional"}}},
            "is not",
        ),
    ],
)
def test_of_mixtures_too(family, overrides, expected):
    with pytest.raises(ModelError, match=expected):
        settle(tiny_mixtures.config(family, **overrides))

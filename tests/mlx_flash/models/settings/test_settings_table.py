"""Every key that a family's config has in transformers is computed, harmless or refused."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

import pytest
from mlx_lm.models import (
    deepseek_v3,
    gemma4_text,
    llama,
    llama4,
    minimax_m3_vl,
    muse_spark,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlx_flash.errors import ModelError
from mlx_flash.models import families, mixtures, registry
from mlx_flash.models.settings import table
from mlx_flash.models.settings.normalise import settle

FAMILIES = sorted(
    name for name in {*families.FAMILIES, *mixtures.MIXTURES} if name in CONFIG_MAPPING
)


# Families whose defaults in transformers make no model that mlx-lm computes: the keys that say so.
NOT_BY_DEFAULT = {
    "bailing_hybrid": ["linear_num_heads"],
    "kimi_linear": ["linear_num_heads"],
    "llama4_text": ["attn_temperature_tuning", "attention_chunk_size", "moe_layers"],
    "mimo_v2_flash": ["layer_types", "mlp_layer_types", "rope_parameters", "sliding_window"],
    "minimax": ["layer_types"],
    "nanochat": ["rms_norm_eps"],
    "phimoe": ["attention_bias", "lm_head_bias"],
    "recurrent_gemma": ["num_key_value_heads"],
    "step3p5": ["n_routed_experts", "rope_parameters"],
}


def text_config(model_type: str) -> dict[str, Any]:
    """transformers' defaults of a family's text model."""
    config = CONFIG_MAPPING[model_type]()
    return (getattr(config, "text_config", None) or config).to_dict()


# Families whose model takes the config of its text model from another module.
INNER: dict[str, tuple[type, ...]] = {
    "gemma4": (gemma4_text.Model, gemma4_text.ModelArgs),
    "kimi_k25": (deepseek_v3.Model, deepseek_v3.ModelArgs),
    "llama4": (llama4.Model, llama4.TextArgs),
    "minimax_m3_vl": (minimax_m3_vl.Model, minimax_m3_vl.TextArgs),
    "mistral3": (llama.Model, llama.ModelArgs),
    "muse_spark": (muse_spark.Model, muse_spark.TextArgs),
    "qwen3_5_moe": (qwen3_5.Model, qwen3_5.TextModelArgs, qwen3_next.Model),
    "qwen3_vl_moe": (qwen3_moe.Model, qwen3_moe.ModelArgs),
}


def read(model_type: str) -> set[str]:
    """Fields of a family's arguments that its module, or one that it is made of, reads."""
    classes = INNER.get(model_type) or registry.get_classes({"model_type": model_type})
    found = set()
    for name in {base.__module__ for each in classes for base in each.__mro__}:
        if name.startswith(("mlx_lm", "mlx_flash")):
            tree = ast.parse(inspect.getsource(sys.modules[name]))
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            found |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return found & inspect.signature(classes[1]).parameters.keys()


def unplaced(model_type: str) -> list[str]:
    config = text_config(model_type)
    name = model_type if model_type in table.NESTED else config["model_type"]
    found = read(model_type)
    return [key for key in config if table.place(name, key, found) is None]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_has_a_place(model_type):
    assert unplaced(model_type) == []


def refused_by_default(model_type: str) -> list[str]:
    """Keys of which transformers' own default is not computed, as the messages name them."""
    config = text_config(model_type)
    nested = {"model_type": model_type, "text_config": config}
    found: list[str] = []
    while True:
        try:
            settle(nested if model_type in table.NESTED else config)
        except ModelError as error:
            key = str(error).partition(" ")[0]
            found.append(key)
            if config.pop(key, None) is None:
                return found
        else:
            return found


def test_defaults_of_transformers_are_computed():
    found = {name: refused_by_default(name) for name in FAMILIES}
    assert {name: keys for name, keys in found.items() if keys} == NOT_BY_DEFAULT

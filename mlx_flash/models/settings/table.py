"""model_type -> what the family's decoder does with the settings of its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from .dense import DENSE
from .mixtures import MIXTURES
from .others import OTHERS
from .rules import Rules

RULES: dict[str, Rules] = OTHERS | DENSE | MIXTURES
# Families of one text model under another name.
TEXT_OF = {"qwen3_vl_moe_text": "qwen3_moe", "qwen3_5_moe_text": "qwen3_5_moe"}
# Families with a ``text_config`` -> rules for that, where it does not name its own.
NESTED = {
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_k3",  # no rules: not in transformers
    "kimi_vl": "deepseek_v3",
    "llama4": "llama4",
    "qwen3_vl_moe": "qwen3_moe",
}


def rules_of(config: Mapping[str, Any]) -> Rules | None:
    """The rules of a config's text model; None where there are none, or a decoder has its own."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    text = config.get("text_config")
    if isinstance(text, Mapping):
        inner = text.get("model_type")
        model_type = NESTED.get(model_type) or (inner if isinstance(inner, str) else model_type)
    found = RULES.get(TEXT_OF.get(model_type, model_type))
    return found or RULES.get(MODEL_REMAPPING.get(model_type, ""))

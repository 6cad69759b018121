"""model_type -> what the family's decoder does with the settings of its config."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from .dense import DENSE
from .harmless import HARMLESS
from .mixtures import MIXTURES
from .others import OTHERS
from .rules import Rules

RULES: dict[str, Rules] = OTHERS | DENSE | MIXTURES
# Families of one text model under another name.
TEXT_OF = {
    "muse_glimmer_text": "muse_glimmer",
    "muse_spark_text": "muse_spark",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# Families with a ``text_config`` -> rules for that, where it does not name its own.
NESTED = {
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_k3",  # no rules: not in transformers
    "kimi_vl": "deepseek_v3",
    "llama4": "llama4",
    "qwen3_vl_moe": "qwen3_moe",
}
WINDOW_KEYS = (
    "_sliding_window_pattern",
    "layer_types",
    "max_window_layers",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
)
# ``families.find`` computes or refuses what they name.
ACTIVATIONS = ("activation", "activation_function", "hidden_act", "hidden_activation")


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


def place(model_type: str, key: str, computed: Container[str]) -> str | None:
    """What becomes of a key of a family's config.

    Args:
        computed: keys that the family's module in mlx-lm, or a decoder of this package, reads.

    Returns:
        "computed", "harmless", "refused" (where its value is not the one that is computed), or
        None for a key that nobody has placed.
    """
    rules = rules_of({"model_type": NESTED.get(model_type, model_type)}) or Rules(None)
    if None in rules.unread.values() or key in rules.only or key in rules.unread:
        return "refused"
    if key in HARMLESS or key in rules.harmless:
        return "harmless"
    rope = (
        ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
        if rules.rope
        else ()
    )
    windows = WINDOW_KEYS if rules.window else ()
    ours = {*rope, *windows, *rules.names, *rules.names.values(), *rules.absent, *rules.written}
    return "computed" if key in ours or key in computed or key in ACTIVATIONS else None

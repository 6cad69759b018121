"""The config of any family, as mlx-lm and the decoders of this package understand it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_flash.errors import ModelError

from . import rope, windows
from .rules import Rules
from .table import rules_of


def settle(config: dict[str, Any]) -> dict[str, Any]:
    """A config in the old spelling, with nothing in it that would be computed otherwise.

    What transformers 5 writes anew (``rope_parameters``, renamed keys, layer types) is written as
    mlx-lm reads it, what mlx-lm would take another default for is said. A config that needs none
    of it comes back as it is, the same object.

    Args:
        config: of a Hugging Face directory, a model directory or a GGUF header; not changed.

    Raises:
        ModelError: a setting has a value under which the output would be wrong, or is of the wrong
            kind. Names key and value, and what to do.
    """
    rules = rules_of(config)
    if rules is None:
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        return _own(config, rules)
    # What the text model lacks, such as its model_type, may stand beside it.
    told = {"model_type": config.get("model_type")} | text
    settled = _own(told, rules)
    if settled is told:
        return config
    if "model_type" not in text:
        settled = {key: value for key, value in settled.items() if key != "model_type"}
    return config | {"text_config": settled}


def _own(config: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """``settle`` without what is nested."""
    named = _named(config, rules)
    for key, told in rules.unread.items():
        if named.get(key) is not None and (told is None or told not in named):
            raise ModelError(
                f"{key} of this {config.get('model_type')} model is written as transformers 5 does "
                "it, which mlx-lm does not read for this family, so its output would be wrong; "
                "expected the config that the model was published with"
            )
    for key, computed in rules.only.items():
        _check(named, key, computed)
    settled = rope.settle(named, rules.rope) if rules.rope else named
    windows.windowed_layers(settled, rules)
    return windows.settle(settled, rules)


def _named(config: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """The config with transformers' names and defaults where mlx-lm has others."""
    more = {
        key: config[theirs]
        for key, theirs in rules.names.items()
        if config.get(key) is None and config.get(theirs) is not None
    }
    for key, value in rules.absent.items():
        if key == "rope_scaling" and config.get("rope_parameters"):
            continue
        if key not in config and key not in more:
            more[key] = value(config | more) if callable(value) else value
    named = config | more if more else config
    changed = rules.translate(named) if rules.translate else {}
    return named | changed if any(named.get(k) != v for k, v in changed.items()) else named


def _check(config: Mapping[str, Any], key: str, computed: Any) -> None:
    """Raise ModelError if mlx-lm computes a setting otherwise; what is absent or null is fine."""
    value = config.get(key)
    if value is None:
        return
    if callable(computed):
        if computed(config, value):
            return
        expected = "its default"
    else:
        if any(
            value == known and isinstance(value, bool) == isinstance(known, bool)
            for known in computed
        ):
            return
        expected = " or ".join(repr(known) for known in computed if known is not None) or "none"
    raise ModelError(
        f"{key} of this {config.get('model_type')} model is {value!r:.120}, which is not computed "
        f"for this family, so its output would be wrong; expected {expected}"
    )

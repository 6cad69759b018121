"""Conditions under which mlx-lm computes a setting, and settings that several keys say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_flash.errors import ModelError

Condition = Callable[[Mapping[str, Any], Any], bool]


def every(kind: str) -> Condition:
    """Whether a list names one kind only."""
    return lambda config, value: isinstance(value, list) and set(value) <= {kind}


def same_as(key: str) -> Condition:
    """Whether a value is that of another key."""
    return lambda config, value: value == config.get(key)


def four_times(key: str) -> Condition:
    """Whether a width is four times another."""
    return lambda config, value: value == 4 * (config.get(key) or 0)


def equal_heads(config: Mapping[str, Any]) -> int | None:
    """The size of a head where all of them share the model's width."""
    heads = config.get("num_attention_heads")
    return config["hidden_size"] // heads if heads and config.get("hidden_size") else None


def shares_width(config: Mapping[str, Any], value: Any) -> bool:
    """Whether a head's size is that of ``equal_heads``."""
    heads = config.get("num_attention_heads") or 1
    return value == (config.get("hidden_size") or 0) // heads


def for_some_layer(config: Mapping[str, Any], value: Any) -> bool:
    """Whether a layer has the window; a model where none has loses its rotary positions, too."""
    kinds = config.get("layer_types")
    return not isinstance(kinds, list) or "sliding_attention" in kinds


def full_every_nth(config: Mapping[str, Any], value: Any) -> bool:
    """Whether every n-th layer, and no other, attends to the whole text."""
    step = config.get("full_attention_interval") or 4
    return value == [
        "linear_attention" if (i + 1) % step else "full_attention" for i in range(len(value))
    ]


def full_attention_interval(config: Mapping[str, Any]) -> dict[str, Any]:
    """The n of every n-th layer that attends to the whole text, from the kinds of all."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        return {}
    return {"full_attention_interval": kinds.index("full_attention") + 1}


def minimax_rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """How many numbers of a head MiniMax-M2 rotates; transformers 5 writes their share."""
    if config.get("rotary_dim") is not None:
        return {}
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return {"rotary_dim": int((config.get("head_dim") or 0) * (1 if share is None else share))}


def rope_but_every_fourth(config: Mapping[str, Any], value: Any) -> bool:
    """Whether all layers but every fourth have rotary positions."""
    return [bool(v) for v in value] == [bool((i + 1) % 4) for i in range(len(value))]


def reaches_everything(config: Mapping[str, Any], value: Any) -> bool:
    """Whether so many tokens are as many as the model can have."""
    longest = config.get("max_position_embeddings")
    return isinstance(longest, int) and value >= longest


def dense_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """How many layers at the start are dense, from the kinds of all.

    Raises:
        ModelError: dense layers come later, too.
    """
    kinds = config.get("mlp_layer_types")
    if not isinstance(kinds, list):
        return {}
    count = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "dense" in kinds[count:]:
        raise ModelError(
            f"mlp_layer_types of this {config.get('model_type')} model is {kinds!r:.120}, but "
            "mlx-lm knows dense layers before all others only, so its output would be wrong"
        )
    return {"first_k_dense_replace": count}


def sparse_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether each layer has experts, from the kinds of all."""
    kinds = config.get("mlp_layer_types")
    return {"is_moe_layer": [k == "sparse" for k in kinds]} if isinstance(kinds, list) else {}


def time_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nemotron's bounds of time steps, which transformers takes from another key than mlx-lm."""
    least = config.get("time_step_min")
    return {} if least is None else {"time_step_limit": [least, float("inf")]}

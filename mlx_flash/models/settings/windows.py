"""Which layers attend to a window of the last tokens only.

transformers writes ``layer_types``, or has a rule for each family; mlx-lm reads that, a pattern, or
nothing. A window as long as the model's last position changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_flash.errors import ModelError

from .rules import Rules

FULL, WINDOWED = "full_attention", "sliding_attention"
Layers = Callable[[Mapping[str, Any], int], list[bool]]


def _typed(otherwise: Layers) -> Layers:
    """``layer_types``, or where it is missing another rule."""

    def layers(config: Mapping[str, Any], count: int) -> list[bool]:
        kinds = config.get("layer_types")
        if isinstance(kinds, list):
            return [kind == WINDOWED for kind in kinds]
        return otherwise(config, count)

    return layers


def _every(config: Mapping[str, Any], count: int) -> list[bool]:
    return [True] * count


def _pattern(default: int) -> Layers:
    """All but every n-th."""

    def layers(config: Mapping[str, Any], count: int) -> list[bool]:
        step = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", default))
        if isinstance(step, str):
            return [step[i % len(step)] == "L" for i in range(count)]
        return [bool((i + 1) % step) if step else False for i in range(count)]

    return layers


def _after(config: Mapping[str, Any], count: int) -> list[bool]:
    first = config.get("max_window_layers", 28)
    return [i >= first for i in range(count)]


def _before_alternating(config: Mapping[str, Any], count: int) -> list[bool]:
    last = config.get("max_window_layers", 28)
    return [i < last and (i + 1) % 2 == 1 for i in range(count)]


def _switched(layers: Layers) -> Layers:
    """None unless ``use_sliding_window``."""

    def switched(config: Mapping[str, Any], count: int) -> list[bool]:
        return layers(config, count) if config.get("use_sliding_window") else [False] * count

    return switched


def _without_rope(config: Mapping[str, Any], count: int) -> list[bool]:
    step = config.get("no_rope_layer_interval", 4)
    rope = config.get("no_rope_layers") or [(i + 1) % step for i in range(count)]
    return [not r for r in rope]


SLIDING: dict[str, Layers] = {
    "every": _every,
    "typed": _typed(lambda config, count: [False] * count),
    "alternating": _typed(_pattern(2)),
    "fourth": _typed(_pattern(4)),
    "sixth": _typed(_pattern(6)),
    "after": _typed(_after),
    "qwen": _switched(_typed(_after)),
    "qwen_moe": _switched(_typed(_before_alternating)),
    "switched": _switched(_every),
    "without_rope": _switched(_typed(_without_rope)),
}


def windowed_layers(config: Mapping[str, Any], rules: Rules) -> tuple[int, list[bool]] | None:
    """(tokens of the window, whether each layer has it); None where that changes nothing.

    Raises:
        ModelError: the window is no number of tokens.
    """
    if rules.window is None:
        return None
    window, count = config.get("sliding_window"), config.get("num_hidden_layers")
    if not window or not isinstance(count, int):
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ModelError(
            f"sliding_window of this {config.get('model_type')} model is {window!r}; expected a "
            "number of tokens"
        )
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and window >= longest and rules.native_window is None:
        return None
    layers = SLIDING[rules.window](config, count)
    if len(layers) != count:
        raise ModelError(
            f"layer_types of this {config.get('model_type')} model names {len(layers)} layers; "
            f"expected num_hidden_layers, {count}"
        )
    return (window, layers) if any(layers) else None


def settle(config: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """A config that tells mlx-lm of the layers with a window in its way; maybe the same dict.

    Raises:
        ModelError: mlx-lm's way cannot say it.
    """
    if rules.native_window not in ("pattern", "letters") or "layer_types" not in config:
        return config
    kinds = config["layer_types"]
    if not isinstance(kinds, list) or not kinds:
        return config
    layers = [kind == WINDOWED for kind in kinds]
    if rules.native_window == "letters":
        written: Any = "".join("L" if windowed else "G" for windowed in layers)
        if len(set(written)) == 1 and not any(layers):
            written = None
    else:
        written = _step(config, layers)
    now = config.get("sliding_window_pattern")
    if now == written or (
        isinstance(now, str)
        and SLIDING["fourth"]({"sliding_window_pattern": now}, len(layers)) == layers
    ):
        return config
    return config | {"sliding_window_pattern": written}


def _step(config: Mapping[str, Any], layers: list[bool]) -> int:
    """n, where all but every n-th layer have the window."""
    step = layers.index(False) + 1 if False in layers else len(layers) + 1
    if layers != [bool((i + 1) % step) for i in range(len(layers))]:
        raise ModelError(
            f"layer_types of this {config.get('model_type')} model give the window to layers "
            f"{[i for i, w in enumerate(layers) if w]!r:.100}, but mlx-lm knows only all but every "
            "n-th, so its output would be wrong"
        )
    return step

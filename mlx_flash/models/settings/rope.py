"""Settings of rotary positions: read in both spellings, written in the one that mlx-lm reads.

transformers 5 keeps all of them in ``rope_parameters``, one object, or one for each kind of layer;
transformers 4 in ``rope_theta``, ``rope_scaling`` and a few keys beside them. Source:
``modeling_rope_utils`` of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_flash.errors import ModelError

from .rules import Rope

# Kind -> settings that it needs.
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
ALIASES = {"su": "longrope", "mrope": "default", "deepseek_yarn": "yarn", "telechat3-yarn": "yarn"}
WITH_ORIGINAL = ("llama3", "yarn", "longrope")
BESIDE = ("rope_theta", "partial_rotary_factor")  # not part of what mlx-lm calls rope_scaling
KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
ROUNDING = 1e-6


def settle(config: dict[str, Any], rope: Rope) -> dict[str, Any]:
    """A config whose rotary settings stand where mlx-lm's module reads them; maybe the same dict.

    Raises:
        ModelError: a setting is missing, of the wrong kind, or cannot be computed.
    """
    new = config.get("rope_parameters")
    if new is not None and not isinstance(new, Mapping):
        raise _error(config, "rope_parameters", new, "expected an object")
    if new and rope.reads_new:
        return _in_place(config, dict(new), rope)
    flat, local = _by_layer(config, dict(new or {}), rope)
    old = config.get("rope_scaling")
    if old is not None and not isinstance(old, Mapping):
        raise _error(config, "rope_scaling", old, "expected an object")
    settings = dict(old or flat)
    kind = kind_of(config, settings)
    theta = settings.get("rope_theta", flat.get("rope_theta"))
    if theta is None and rope.theta:
        theta = config.get(rope.theta)
    share = settings.get("partial_rotary_factor", flat.get("partial_rotary_factor"))
    share = config.get("partial_rotary_factor") if share is None else share
    if share is None and rope.share:
        share = config.get(rope.share)
    changed = {k: v for k, v in config.items() if k != "rope_parameters"} if new else dict(config)
    if theta is not None or rope.default_theta is not None:
        _put(changed, rope.theta, rope.default_theta if theta is None else theta)
    if rope.uses_share and (share is not None or rope.default_share != rope.built_in_share):
        _put(
            changed,
            rope.share or "partial_rotary_factor",
            rope.default_share if share is None else share,
        )
    elif share not in (None, 1, 1.0) and kind not in ("default", "proportional"):
        raise _error(config, "partial_rotary_factor", share, f"expected 1 with rope {kind}")
    if rope.local and rope.local != rope.theta:
        _put(changed, rope.local, local or config.get(rope.local) or rope.default_local)
    if kind != "default":
        scaling = _scaling(changed, kind, settings, rope)
        if scaling != old:
            changed["rope_scaling"] = scaling
    elif rope.plain and old != rope.plain:
        changed["rope_scaling"] = dict(rope.plain)
    elif not rope.plain and (new or (old and rope.spelling)):
        changed["rope_scaling"] = None
    return config if changed == config else changed


def _in_place(config: dict[str, Any], new: dict[str, Any], rope: Rope) -> dict[str, Any]:
    """A config whose module reads ``rope_parameters``, with what it would misread written out."""

    def settled(entry: Mapping[str, Any]) -> Mapping[str, Any]:
        kind = kind_of(config, entry)
        if kind == "default":
            return entry
        beside = {key: entry[key] for key in BESIDE if key in entry}
        return {**beside, **_scaling(config, kind, entry, rope)}

    if any(isinstance(entry, Mapping) for entry in new.values()):
        found: Any = {k: settled(v) if isinstance(v, Mapping) else v for k, v in new.items()}
    else:
        found = settled(new)
    return config if found == new else config | {"rope_parameters": found}


def kind_of(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The kind of rotary positions, under transformers' name.

    Raises:
        ModelError: it is not known.
    """
    said = settings.get("rope_type", settings.get("type")) or "default"
    kind = ALIASES.get(said, said) if isinstance(said, str) else said
    if kind not in NEEDED:
        raise _error(config, "rope_type", said, f"expected one of {', '.join(NEEDED)}")
    return kind


def _put(config: dict[str, Any], key: str | None, value: Any) -> None:
    """Set a number; one that is there stays as it is written."""
    if key is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(config, key, value, "expected a number")
    if config.get(key) != value:
        config[key] = value


def _by_layer(
    config: Mapping[str, Any], new: dict[str, Any], rope: Rope
) -> tuple[dict[str, Any], float | None]:
    """(settings of layers without a window, base of those with one) of ``rope_parameters``."""
    kinds = [key for key in new if isinstance(new[key], Mapping) and key in KINDS_OF_LAYERS]
    if not kinds:
        return new, None
    full = dict(new.get("full_attention") or new[kinds[0]])
    windowed = dict(new.get("sliding_attention") or full)
    if rope.local:
        if kind_of(config, windowed) != "default":
            raise _error(
                config,
                "rope_type of sliding_attention",
                windowed.get("rope_type"),
                "mlx-lm scales no positions there, so its output would be wrong; expected default",
            )
        if rope.local != rope.theta or full.get("rope_theta") == windowed.get("rope_theta"):
            return full, windowed.get("rope_theta")
    present = set(config.get("layer_types") or kinds)
    if set(KINDS_OF_LAYERS) <= present and full != windowed:
        raise _error(
            config,
            "rope_parameters",
            new,
            "mlx-lm has one base of rotary positions for all layers of this family, so its output "
            "would be wrong; expected the same for both",
        )
    return full if "full_attention" in present else windowed, None


def _scaling(
    config: Mapping[str, Any], kind: str, settings: Mapping[str, Any], rope: Rope
) -> dict[str, Any]:
    """What ``rope_scaling`` has to hold for mlx-lm or ``rope_override`` to do as transformers."""
    found = {k: v for k, v in settings.items() if k not in BESIDE and v is not None}
    if kind == "proportional" and "partial_rotary_factor" in settings:
        found["partial_rotary_factor"] = settings["partial_rotary_factor"]
    if kind == "yarn" and settings.get("factor", 1) is None:
        found["factor"] = _ratio(config, found)
    needed = NEEDED[kind]
    if rope.mscales:
        if kind != "longrope":
            raise _error(
                config,
                "rope_type",
                kind,
                "which is not computed for this family, so its output would be wrong; expected "
                "default or longrope",
            )
        needed += ("short_mscale", "long_mscale")
    if missing := [key for key in needed if key not in found]:
        raise _missing(config, settings, *missing)
    for key in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
        value = found.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise _error(config, f"{key} of rope {kind}", value, "expected a number above 0")
    for key in ("type", "rope_type"):
        if key in found or key == rope.spelling:
            found[key] = "su" if found.get(key) == "su" else kind
    if kind in WITH_ORIGINAL:
        found["original_max_position_embeddings"] = _original(config, found)
    if kind == "linear" and rope.spelling == "type":
        found["factor"] = float(found["factor"])  # mlx-lm asserts it
    if kind == "yarn":
        _settle_yarn(config, found, rope)
    if kind == "proportional" and rope.uses_share:
        raise _error(config, "rope_type", kind, "which is not computed for this family")
    if not rope.replaceable and (kind not in rope.kinds or found.get("truncate") is False):
        what = "truncate" if kind in rope.kinds else "rope_type"
        raise _error(
            config,
            what,
            found.get("truncate") if kind in rope.kinds else kind,
            "which is not computed for this family, so its output would be wrong; expected "
            + ("true" if kind in rope.kinds else f"one of {', '.join(sorted(rope.kinds))}"),
        )
    return found


def _original(config: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """The length that a model was made for before its positions were scaled."""
    key = "original_max_position_embeddings"
    value = config.get(key) or settings.get(key) or config.get("max_position_embeddings")
    if value is None:
        raise _missing(config, settings, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
        raise _error(config, key, value, "expected a number of tokens")
    return value


def _ratio(config: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    longest = config.get("max_position_embeddings")
    return (longest or 0) / _original(config, settings)


def attention_factor(config: Mapping[str, Any], settings: Mapping[str, Any], kind: str) -> float:
    """What yarn and LongRope multiply rotated queries and keys by."""
    given = settings.get("attention_factor")
    if given is not None:
        return float(given)
    factor = settings.get("factor") or _ratio(config, settings)
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(_original(config, settings)))
    mscale, over_all = settings.get("mscale"), settings.get("mscale_all_dim")
    if mscale and over_all:
        return _yarn_scale(factor, mscale) / _yarn_scale(factor, over_all)
    return _yarn_scale(factor, 1)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _settle_yarn(config: Mapping[str, Any], found: dict[str, Any], rope: Rope) -> None:
    """Write yarn's factor of the attention as the mscale that gives it in mlx-lm."""
    for key in ("beta_fast", "beta_slow"):
        if not found.get(key):
            found.pop(key, None)
    wanted = attention_factor(config, found, "yarn")
    factor, over_all = found["factor"], found.get("mscale_all_dim", 0)
    computed = _yarn_scale(factor, found.get("mscale", 1)) / _yarn_scale(factor, over_all)
    if abs(wanted - computed) <= ROUNDING:
        return
    if factor <= 1:
        raise _error(
            config,
            "attention_factor",
            wanted,
            f"which mlx-lm does not compute with factor {factor}, so its output would be wrong; "
            "expected 1",
        )
    found["attention_factor"] = wanted  # read again, the mscale below means nothing else
    found["mscale"] = (wanted * _yarn_scale(factor, over_all) - 1) / (0.1 * math.log(factor))


def _missing(config: Mapping[str, Any], settings: Mapping[str, Any], *keys: str) -> ModelError:
    return ModelError(
        f"rope_type of this {config.get('model_type')} model is {kind_of(config, settings)!r}, but "
        f"its config has no {' and no '.join(keys)}; get the config that the model was published "
        "with"
    )


def _error(config: Mapping[str, Any], key: str, value: Any, what: str) -> ModelError:
    return ModelError(f"{key} of this {config.get('model_type')} model is {value!r:.120}; {what}")

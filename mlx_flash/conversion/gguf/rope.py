"""Rope settings of a GGUF as transformers' ``rope_scaling``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_flash.errors import ModelError
from mlx_flash.models.settings.rope import attention_factor

from .keys import Keys, shortest

# Tensors that hold rope's factors; all are vectors of half the rotated dimensions.
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
KINDS = ("none", "linear", "yarn", "longrope")


def rope_scaling(
    keys: Keys, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """transformers' ``rope_scaling``; None where nothing is scaled.

    Args:
        keys: of the file.
        config: with ``rope_theta`` and ``max_position_embeddings``.
        vectors: those of ``TENSORS`` that the file has.

    Raises:
        ModelError: it is of a kind that has no name in transformers.
    """
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in KINDS:
        raise ModelError(f"rope scaling {kind!r:.60}; supported: {', '.join(KINDS)}")
    factor = _factor(keys, kind)
    longrope = kind == "longrope" or LONG in vectors or SHORT in vectors
    if FREQS in vectors and not np.all(vectors[FREQS] == 1):
        if factor != 1 or longrope:
            raise ModelError(f"rope_freqs.weight and {kind} rope scaling; expected one of them")
        original = keys.size("rope.scaling.original_context_length", 8192)
        return _llama3(vectors[FREQS], config["rope_theta"], original)
    original = keys.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    if longrope:
        return _longrope(keys, config, vectors, original)
    if factor == 1:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    return scaling | _yarn(keys, original) if kind == "yarn" else scaling


def _factor(keys: Keys, kind: str) -> float:
    """How much longer the positions are than those trained on."""
    name = "rope.scaling.factor" if keys.get("rope.scaling.factor") else "rope.scale_linear"
    return keys.number(name, 1.0) if kind != "none" and keys.get(name) else 1.0


def _yarn(keys: Keys, original: int) -> dict[str, Any]:
    names = {
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
        "attention_factor": "rope.scaling.yarn_attn_factor",
    }
    found = {name: keys.number(key) for name, key in names.items() if keys.get(key) is not None}
    if keys.get("rope.scaling.yarn_ext_factor", 1) != 1:
        raise ModelError(
            f"{keys.arch}.rope.scaling.yarn_ext_factor is "
            f"{keys.get('rope.scaling.yarn_ext_factor')!r:.60}; only 1 is computed"
        )
    return {"original_max_position_embeddings": original} | found


def _longrope(
    keys: Keys, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray], original: int
) -> dict[str, Any]:
    if LONG not in vectors or SHORT not in vectors:
        raise ModelError(f"longrope scaling; expected both {LONG} and {SHORT}")
    scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "long_factor": [shortest(f) for f in vectors[LONG]],
        "short_factor": [shortest(f) for f in vectors[SHORT]],
    }
    usual = attention_factor(config, scaling, "longrope") if original > 1 else 1.0
    stated = keys.number("rope.scaling.attn_factor", usual)
    # Files hold what transformers computes itself, rounded to float32; anything else is a setting.
    return (
        scaling
        if math.isclose(stated, usual, rel_tol=1e-5)
        else scaling | {"attention_factor": stated}
    )


def _llama3(factors: np.ndarray, theta: float, context: int) -> dict[str, Any]:
    """The llama-3 scaling that gives ``factors``; a GGUF holds only the outcome, so it is tried."""
    factor = float(factors.max())
    turns = context / (2 * np.pi * theta ** (np.arange(len(factors)) / len(factors)))
    smooth = np.clip((turns - 1) / 3, 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelError(
            f"rope_freqs.weight is not llama-3 scaling by {factor:g} from {context} positions, the "
            "only kind known; convert the Hugging Face checkpoint instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }

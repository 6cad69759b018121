"""Rotary positions that mlx-lm has no module for, or that its module of a family leaves out.

A family whose module ignores ``rope_scaling`` is made with plain positions, which are replaced;
yarn without truncation and LongRope with its short factors are computed for all. Source:
``modeling_rope_utils`` of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from .settings import rope
from .settings.rules import Rope
from .settings.table import rules_of
from .settings.windows import windowed_layers


class ScaledRope(nn.Module):
    """Rotary positions of given frequencies, what they rotate multiplied by a factor.

    Args:
        dims: rotated numbers of a head, its first ones.
        traditional: whether neighbours are rotated together, instead of halves.
        wavelengths: [dims / 2], how many tokens a radian takes.
        factor: what rotated numbers are multiplied by.
        long: wavelengths of texts longer than ``limit`` tokens; None for the same.
    """

    def __init__(
        self,
        dims: int,
        traditional: bool,
        wavelengths: mx.array,
        factor: float,
        long: mx.array | None = None,
        limit: int = 0,
    ) -> None:
        super().__init__()
        self.dims, self.traditional, self._factor, self._limit = dims, traditional, factor, limit
        self._freqs = wavelengths
        self._long = wavelengths if long is None else long

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """``x`` [batch, heads, length, head size] rotated by positions from ``offset`` on."""
        if self._factor != 1.0:
            x = x.at[..., : self.dims].multiply(self._factor)
        end = offset + x.shape[-2]
        if isinstance(end, mx.array):
            freqs = mx.where(mx.max(end) > self._limit, self._long, self._freqs)
        else:
            freqs = self._long if end > self._limit else self._freqs
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )


def needs_override(config: Mapping[str, Any], rules: Rope) -> bool:
    """Whether mlx-lm's module of a family computes other positions than a settled config says."""
    scaling = config.get("rope_scaling")
    kind = rope.kind_of(config, scaling) if scaling else "default"
    if kind not in rules.kinds or (kind == "yarn" and scaling.get("truncate") is False):
        return rules.replaceable
    return (
        rules.uses_share and rules.share is None and _share(config, rules) != rules.built_in_share
    )


def override_rope(
    model_class: type, args_class: type, config: dict[str, Any], rules: Rope
) -> tuple[type, type]:
    """(model class, arguments class) like those given, with the positions of a settled config."""

    class Model(model_class):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            others = _windowed(self, config) if rules.local else set()
            for _, module in list(self.named_modules()):
                for name, child in module.items():
                    if type(child) is nn.RoPE and id(module) not in others:
                        module[name] = replacement(child, config, rules)

    class ModelArgs(args_class):
        @classmethod
        def from_dict(cls, params: Mapping[str, Any]) -> Any:
            plain = {**params, "rope_scaling": None}
            if isinstance(text := params.get("text_config"), Mapping):
                plain["text_config"] = {**text, "rope_scaling": None}
            return super().from_dict(plain)

    return Model, ModelArgs


def _windowed(model: nn.Module, config: Mapping[str, Any]) -> set[int]:
    """Identities of the modules in layers with a window, whose positions are not scaled."""
    family = rules_of(config)
    _, layers = (family and windowed_layers(config, family)) or (0, [])
    return {
        id(module)
        for layer, windowed in zip(model.layers, layers, strict=False)
        if windowed
        for _, module in layer.named_modules()
    }


def _share(config: Mapping[str, Any], rules: Rope) -> float:
    share = config.get(rules.share or "partial_rotary_factor")
    return rules.default_share if share is None else share


def replacement(plain: nn.RoPE, config: Mapping[str, Any], rules: Rope) -> nn.Module:
    """The module that a settled config asks for, in the place of mlx-lm's plain one."""
    dims = plain.dims
    if rules.uses_share and rules.share is None:
        dims = int(dims / rules.built_in_share * _share(config, rules))
    scaling = config.get("rope_scaling")
    kind = rope.kind_of(config, scaling) if scaling else "default"
    if kind == "longrope":
        return _longrope(dims, plain, config, scaling)
    if kind == "yarn":
        wavelengths = yarn_wavelengths(dims, plain.base, scaling)
        factor = rope.attention_factor(config, scaling, kind)
        return ScaledRope(dims, plain.traditional, wavelengths, factor)
    spelled = {**scaling, "type": kind} if scaling else None
    longest = config.get("max_position_embeddings")
    return initialize_rope(dims, plain.base, plain.traditional, spelled, longest)


def _longrope(
    dims: int, plain: nn.RoPE, config: Mapping[str, Any], scaling: Mapping[str, Any]
) -> nn.Module:
    plain_lengths = plain.base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    short, long = (
        mx.array(scaling[key], dtype=mx.float32) * plain_lengths
        for key in ("short_factor", "long_factor")
    )
    factor = rope.attention_factor(config, scaling, "longrope")
    limit = scaling["original_max_position_embeddings"]
    return ScaledRope(dims, plain.traditional, short, factor, long, limit)


def yarn_wavelengths(dims: int, base: float, scaling: Mapping[str, Any]) -> mx.array:
    """Wavelengths [dims / 2] of yarn, as transformers computes them."""
    original = scaling["original_max_position_embeddings"]

    def place(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(scaling.get("beta_fast") or 32), place(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low), 0, 1)
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return 1 / (ramp / (scaling["factor"] * plain) + (1 - ramp) / plain)

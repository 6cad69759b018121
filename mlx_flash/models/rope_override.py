"""Rotary positions that mlx-lm has no module for, or that its module of a family leaves out.

A family whose module ignores ``rope_scaling`` is made with plain positions, which are replaced;
yarn without truncation, LongRope with its short factors and "dynamic" are computed for all. The
last two depend on how long a text is. What has been rotated for a short one stays so in its cache,
so a text that outgrows the limit step by step is refused, unless LongRope's is known to beforehand
(``fit_context``). Source: ``modeling_rope_utils`` of
transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from mlx_flash.errors import ModelError

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
    """

    def __init__(
        self, dims: int, traditional: bool, wavelengths: mx.array, factor: float = 1.0
    ) -> None:
        super().__init__()
        self.dims, self.traditional, self._factor = dims, traditional, factor
        self._freqs = wavelengths

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """``x`` [batch, heads, length, head size] rotated by positions from ``offset`` on."""
        if self._factor != 1.0:
            x = x.at[..., : self.dims].multiply(self._factor)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._freqs,
        )


class TwoRopes(nn.Module):
    """Rotary positions of short texts, and others of those that are longer than a limit.

    Args:
        short: for texts up to ``limit`` tokens.
        long: gets the number of tokens of a longer text.
        one_for_all: whether all longer texts have the same.
    """

    def __init__(
        self,
        short: nn.Module,
        long: Callable[[int], nn.Module],
        limit: int,
        one_for_all: bool = False,
    ) -> None:
        super().__init__()
        self._short, self._long, self._limit = short, long, limit
        self._one_for_all = one_for_all
        load = "load the model with the context that you need"
        self._instead = load if one_for_all else "give a longer text whole, in one pass"

    def fit_context(self, context: int) -> None:
        """See the function of that name."""
        if self._one_for_all and context > self._limit:
            self._limit = 0

    @property
    def limit(self) -> int:
        """Tokens of the longest text that counts as short."""
        return self._limit

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """``x`` [batch, heads, length, head size] rotated by positions from ``offset`` on.

        Raises:
            ModelError: the text outgrows the limit with its first tokens rotated already.
        """
        length = x.shape[-2]
        starts = [offset] if isinstance(offset, int) else offset.reshape(-1).tolist()
        for start in starts:
            if 0 < start <= self._limit < start + length:
                raise ModelError(
                    f"a text outgrows {self._limit} tokens, from where on the positions of this "
                    "model are scaled otherwise, the earlier ones too; keep to "
                    f"{self._limit} tokens, or {self._instead}"
                )
        end = max(starts) + length
        if end <= self._limit:
            return self._short(x, offset)
        rotated = self._long(end)(x, offset)
        if min(starts) + length > self._limit:
            return rotated
        long = (offset + length > self._limit).reshape(-1, 1, 1, 1)
        return mx.where(long, rotated, self._short(x, offset))


def fit_context(model: nn.Module, context: int) -> None:
    """Let LongRope rotate for texts of ``context`` tokens from the first token on.

    A context within the model's original length changes nothing. transformers starts anew with the
    long factors once a text outgrows it; where that is to be expected, they are taken at once.
    """
    for _, module in model.named_modules():
        if isinstance(module, TwoRopes):
            module.fit_context(context)


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
        return _longrope(dims, plain, config, scaling, rules)
    if kind == "dynamic":
        return _dynamic(dims, plain, config, scaling)
    if kind == "yarn":
        wavelengths = yarn_wavelengths(dims, plain.base, scaling)
        factor = rope.attention_factor(config, scaling, kind)
        return ScaledRope(dims, plain.traditional, wavelengths, factor)
    spelled = {**scaling, "type": kind} if scaling else None
    longest = config.get("max_position_embeddings")
    return initialize_rope(dims, plain.base, plain.traditional, spelled, longest)


def _longrope(
    dims: int,
    plain: nn.RoPE,
    config: Mapping[str, Any],
    scaling: Mapping[str, Any],
    rules: Rope,
) -> nn.Module:
    plain_lengths = plain.base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    usual = rope.attention_factor(config, scaling, "longrope")
    short, long = (
        ScaledRope(
            dims,
            plain.traditional,
            mx.array(scaling[f"{length}_factor"], dtype=mx.float32) * plain_lengths,
            (scaling.get(f"{length}_mscale") if rules.mscales else None) or usual,
        )
        for length in ("short", "long")
    )
    limit = scaling["original_max_position_embeddings"]
    return TwoRopes(short, lambda _length: long, limit, one_for_all=True)


def _dynamic(
    dims: int, plain: nn.RoPE, config: Mapping[str, Any], scaling: Mapping[str, Any]
) -> nn.Module:
    limit, factor = config["max_position_embeddings"], scaling["factor"]

    def long(length: int) -> nn.Module:
        grown = factor * length / limit - (factor - 1)
        base = plain.base * grown ** (dims / (dims - 2))
        return nn.RoPE(dims, traditional=plain.traditional, base=base)

    return TwoRopes(plain, long, limit)


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

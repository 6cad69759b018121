"""What a family's decoder does with the settings of its config, as one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Kinds of rotary positions that mlx-lm's ``initialize_rope`` makes, and those that every module
# makes. LongRope is not among them: mlx-lm leaves out its short factors; nor is "dynamic", whose
# keys of a text that outgrows its limit are not those of the same text in one pass.
PLAIN = frozenset({"default"})
LINEAR = PLAIN | {"linear"}
SCALED = LINEAR | {"llama3", "yarn"}
ANY = SCALED | {"proportional"}


@dataclass(frozen=True)
class Rope:
    """How mlx-lm's module of a family reads the settings of rotary positions.

    Args:
        theta: key of the base; None where the module has a base of its own.
        share: key of the rotated share of a head; None where there is none.
        built_in_share: the share that the module rotates where there is no key.
        uses_share: whether transformers' model rotates a share of a head.
        default_theta: transformers' base where the config has none; None for what mlx-lm takes.
        default_share: transformers' share where the config has none.
        kinds: what the module makes of ``rope_scaling`` as transformers does.
        spelling: the key, of ``type`` and ``rope_type``, that the module insists on.
        local: key of the base in layers with a window, which have no other settings; the same as
            ``theta`` where mlx-lm has one for both.
        default_local: that base where the config has none.
        replaceable: whether ``rope_override`` may put in other modules; not where the attention's
            own scale hangs on ``rope_scaling``.
        scales_attention: whether ``mscale_all_dim`` scales the attention, too.
        reads_new: whether the module reads ``rope_parameters``, which then stays.
        mscales: whether LongRope's ``short_mscale`` and ``long_mscale`` mean anything.
        plain: what ``rope_scaling`` has to say where nothing is scaled; None for nothing.
    """

    theta: str | None = "rope_theta"
    share: str | None = None
    built_in_share: float = 1.0
    uses_share: bool = False
    default_theta: float | None = 10000.0
    default_share: float = 1.0
    kinds: frozenset[str] = ANY
    spelling: str | None = None
    local: str | None = None
    default_local: float = 10000.0
    replaceable: bool = True
    scales_attention: bool = False
    reads_new: bool = False
    mscales: bool = False
    plain: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Rules:
    """A family's settings.

    Args:
        rope: rotary positions; None where there are none, or a decoder of this package reads them.
        window: which layers transformers gives the window: a name in ``windows.SLIDING``, or None
            where there is no such setting.
        native_window: how mlx-lm is told of them: "layer_types", "pattern" or "letters"; None
            where it gives no layer a window and ``window_override`` has to.
        names: mlx-lm's key -> the key of transformers that says the same.
        absent: key -> what transformers takes where the config does not say, and mlx-lm would not.
            A function gets the config.
        only: key -> the values under which mlx-lm computes what transformers does. A function gets
            the config and the value.
        harmless: key -> why its value changes no logit.
        unread: keys of transformers 5 that mlx-lm cannot read -> the key by which it would be told
            the same, or None where that is another model.
        translate: what else has to be written anew; gets a config, gives what changes.
        written: keys that ``translate`` reads.
    """

    rope: Rope | None = Rope()
    window: str | None = None
    native_window: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...] | Callable[[Mapping[str, Any], Any], bool]] = field(
        default_factory=dict
    )
    harmless: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str | None] = field(default_factory=dict)
    translate: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    written: tuple[str, ...] = ()

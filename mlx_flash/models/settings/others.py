"""Rules of families that mlx-lm has and transformers has not.

What their settings mean nobody says but mlx-lm, so nothing is filled in and little is refused.
Their rotary settings may be spelled as transformers 5 does all the same.
"""

from __future__ import annotations

from .rules import ANY, LINEAR, PLAIN, Rope, Rules


def _said(kinds: frozenset[str], **other: str) -> Rules:
    """Rotary settings as the config says them, of some kinds."""
    return Rules(Rope(default_theta=None, kinds=kinds | {"longrope"}, replaceable=False, **other))


OTHERS: dict[str, Rules] = {
    **dict.fromkeys(
        (
            "bailing_moe",
            "bailing_moe_linear",
            "bailing_moe_v3",
            "iquestloopcoder",
            "longcat_flash_ngram",
            "mimo",
            "nanbeige",
            "telechat3",
            "xverse",
            "youtu_llm",
        ),
        _said(ANY),
    ),
    **dict.fromkeys(("Klear", "baichuan_m1", "lille-130m", "plamo", "talkie"), _said(PLAIN)),
    "deepseek": _said(LINEAR, spelling="type"),
    "deepseek_v41": _said(PLAIN | {"yarn"}),
    "gear": _said(ANY, local="rope_local_base_freq"),
    "hunyuan": _said(PLAIN | {"dynamic"}, spelling="type"),
    "internlm2": _said(LINEAR | {"dynamic"}, spelling="type"),
    "nemotron-nas": _said(ANY, spelling="rope_type"),
    "plamo3": _said(PLAIN, local="rope_local_theta"),
}

"""How text is cut into words before byte-level BPE, by the name that a GGUF gives the rule.

The patterns are those of the tokenizer.json files that the names stand for. A name without an entry
is an error: a guess would give other ids than the model was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers import pre_tokenizers as pre

_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HAN = r"[一-龥぀-ゟ゠-ヿ]+"
_PUNCTUATED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)


def _lines(digits: str) -> str:
    """Words, numbers of so many digits, punctuation with the line ends behind it."""
    return (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased(digits: str, endings: str) -> str:
    """The same, but words end where capitals begin again."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{endings}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{endings}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


def _cut(*patterns: str) -> Callable[[bool], pre.PreTokenizer]:
    """Every match of a pattern is a word of its own; the words are cut by the next pattern."""

    def make(_prefix: bool) -> pre.PreTokenizer:
        cuts = [pre.Split(Regex(p), behavior="isolated") for p in patterns]
        return pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


def _digits(_prefix: bool) -> pre.PreTokenizer:
    return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])


@dataclass(frozen=True)
class PreTokenizer:
    """One rule.

    Args:
        make: from whether text gets a space before it (which only GPT-2's own rule has a use for:
            elsewhere transformers and llama.cpp ignore it) to the pre-tokenizer.
        nfc: text is composed (Unicode's NFC) first.
        whole: a word that is a token becomes that token, without merges.
        begins: text begins with the token for that, where the file does not say.
    """

    make: Callable[[bool], pre.PreTokenizer]
    nfc: bool = False
    whole: bool = False
    begins: bool = False


_GPT2 = PreTokenizer(lambda prefix: pre.ByteLevel(add_prefix_space=prefix))
_LLAMA3 = PreTokenizer(_cut(_lines("{1,3}")), whole=True, begins=True)
_THREE_DIGITS = PreTokenizer(_cut(_lines("{1,3}")))
_QWEN2 = PreTokenizer(_cut(_lines("")), nfc=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
    "default": PreTokenizer(
        _cut(r"[\p{P}$+<=>\^~|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), PreTokenizer(_digits)),
    "command-r": PreTokenizer(_digits, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "stablelm2": PreTokenizer(_cut(_lines(""))),
    "seed-coder": PreTokenizer(
        _cut(_lines("").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"))
    ),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer(_cut(_cased("{1,3}", rf"{_ENDINGS}?")))),
    "tekken": PreTokenizer(_cut(_cased("", "")), whole=True, begins=True),
    "deepseek-coder": PreTokenizer(
        _cut(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
    "deepseek-v3": PreTokenizer(_cut(r"\p{N}{1,3}", _HAN, _PUNCTUATED)),
}

"""Tokenizer files from the metadata of a GGUF file.

Knows: the two kinds of vocabulary that are read, ``gpt2`` (byte-level BPE with merges) and
``llama`` (sentencepiece BPE with scores), which metadata of them are sound, and the files that
transformers, mlx-lm, tokenizers and (second kind) sentencepiece load. Does not know: the file
itself, how a vocabulary becomes a tokenizer (``vocabularies``), how text is cut
(``pre_tokenizers``).
``special_tokens_map.json`` is not written: nothing reads more from it than
``tokenizer_config.json`` says.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from mlx_flash.errors import ModelError

from .pre_tokenizers import PRE_TOKENIZERS
from .vocabularies import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    byte_level,
    merges_of,
    scored,
    sentencepiece_model,
    special_ids,
    texts_of,
)

KINDS = ("gpt2", "llama")
LONGEST_TOKEN = 1024  # characters; the longest known are runs of some hundred spaces
# Names of end-of-turn tokens, for files whose metadata do not give its id.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
TEMPLATE = "tokenizer.chat_template"


def check(meta: dict[str, Any]) -> None:
    """Raises ModelError if ``write`` could not make a tokenizer of these metadata."""
    kind, name = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind not in KINDS:
        raise ModelError(f"tokenizer kind {kind!r:.60}; supported: {', '.join(KINDS)}")
    if kind == "gpt2" and (not isinstance(name, str) or name not in PRE_TOKENIZERS):
        raise ModelError(
            f"tokenizer.ggml.pre is {name!r:.60}; known: {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Convert the Hugging Face checkpoint, which has its own tokenizer.json"
        )
    if meta.get("tokenizer.ggml.precompiled_charsmap"):
        raise ModelError("tokenizer.ggml.precompiled_charsmap is set; expected none of this kind")
    _check_lists(meta, kind)
    _check_singles(meta)
    tokens = meta["tokenizer.ggml.tokens"]
    twice = [t for t, count in Counter(texts_of(meta)).items() if count > 1]
    if twice or "" in tokens:
        raise ModelError(f"tokens that are empty or occur twice: {twice[:8] or ['']!r:.300}")
    special = special_ids(meta)
    if bad := {k: v for k, v in special.items() if not 0 <= v < len(tokens)}:
        raise ModelError(f"special tokens {bad}; expected ids below {len(tokens)}")
    for name in ("bos", "eos"):
        if meta.get(f"tokenizer.ggml.add_{name}_token") and name not in special:
            raise ModelError(f"add_{name}_token is set; expected a {name}_token_id too")
    if kind == "gpt2":
        merges_of(meta)
    elif (unknown := meta["tokenizer.ggml.token_type"].count(UNKNOWN)) != 1:
        raise ModelError(f"{unknown} tokens of type unknown; sentencepiece needs exactly one")


def _check_lists(meta: dict[str, Any], kind: str) -> None:
    """Raises ModelError unless tokens, their types and merges or scores are lists that fit."""
    wanted: dict[str, Any] = {"tokens": str, "token_type": int}
    wanted |= {"merges": str} if kind == "gpt2" else {"scores": int | float}
    found = {name: meta.get(f"tokenizer.ggml.{name}") for name in wanted}
    found = {name: [] if values is None else values for name, values in found.items()}
    for name, values in found.items():
        if not isinstance(values, list) or not all(isinstance(v, wanted[name]) for v in values):
            raise ModelError(
                f"tokenizer.ggml.{name} is {values!r:.60}; expected a list of "
                f"{'texts' if wanted[name] is str else 'numbers'}"
            )
    sizes = {name: len(values) for name, values in found.items()}
    same = {size for name, size in sizes.items() if name != "merges"}
    if not sizes["tokens"] or len(same) > 1 or not sizes.get("merges", 1):
        raise ModelError(f"tokenizer lists of sizes {sizes}; expected one entry for each token")
    if unknown := sorted(set(found["token_type"]) - set(range(NORMAL, BYTE + 1)))[:8]:
        raise ModelError(f"tokens of the types {unknown}; expected {NORMAL} to {BYTE}")
    if not all(map(math.isfinite, found.get("scores", []))):
        raise ModelError("scores of tokens that are not finite")
    if (longest := max(map(len, found["tokens"]))) > LONGEST_TOKEN:
        raise ModelError(
            f"a token of {longest} characters; expected at most {LONGEST_TOKEN}, several times "
            "what is known"
        )


def _check_singles(meta: dict[str, Any]) -> None:
    """Raises ModelError for an id that is no whole number, or a template that is no text."""
    for key, value in meta.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and not whole:
            raise ModelError(f"{key} is {value!r:.60}; expected the number of a token")
        named = key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
        if named and not isinstance(value, str):
            raise ModelError(f"{key} is {value!r:.60}; expected a text")


def config_ids(meta: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list if there are several) and pad_token_id, where known."""
    special, ends = special_ids(meta), _end_ids(meta)
    ids: dict[str, Any] = {f"{k}_token_id": special[k] for k in ("bos", "pad") if k in special}
    return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def write(meta: dict[str, Any], out: Path, max_length: int) -> None:
    """Writes the tokenizer's files and generation_config.json into the directory ``out``."""
    check(meta)
    sentencepiece = meta["tokenizer.ggml.model"] == "llama"
    tokenizer = scored(meta) if sentencepiece else byte_level(meta)
    _add_tokens(tokenizer, meta)
    _add_ends(tokenizer, meta)
    tokenizer.save(str(out / "tokenizer.json"))
    tokens, special = meta["tokenizer.ggml.tokens"], special_ids(meta)
    named = [k for k in ("bos", "eos", "unk", "pad") if k in special]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    } | {f"{name}_token": tokens[special[name]] for name in named}
    if template := _templates(meta):
        config["chat_template"] = template
    _save(out / "tokenizer_config.json", config)
    _save(out / "generation_config.json", config_ids(meta))
    if sentencepiece:
        (out / "tokenizer.model").write_bytes(sentencepiece_model(meta))


def _templates(meta: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or all of them as transformers lists those that have names."""
    default = meta.get(TEMPLATE)
    named = {
        key.removeprefix(f"{TEMPLATE}."): value
        for key, value in meta.items()
        if key.startswith(f"{TEMPLATE}.")
    }
    if not named:
        return default
    every = ({"default": default} if default else {}) | named
    return [{"name": name, "template": template} for name, template in every.items()]


def _save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _end_ids(meta: dict[str, Any]) -> list[int]:
    """Ids that end a generation: eos, then end of turn and end of message if they are others."""
    special = special_ids(meta)
    ends = [special[k] for k in ("eos", "eot", "eom") if k in special]
    if "eot" not in special:
        template = meta.get(TEMPLATE, "")
        tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
        named = [tokens.index(t) for t in TURN_ENDS if t in template and t in tokens]
        ends += [i for i in named if types[i] == CONTROL]
    return list(dict.fromkeys(ends))


def _add_tokens(tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Control tokens become special ones and user-defined tokens added ones, with their ids."""
    pairs = list(zip(texts_of(meta), meta["tokenizer.ggml.token_type"], strict=True))
    special = [AddedToken(t, normalized=False) for t, k in pairs if k in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in pairs if k == USER_DEFINED])


def _rule_begins(meta: dict[str, Any]) -> bool:
    rule = PRE_TOKENIZERS.get(meta.get("tokenizer.ggml.pre", ""))
    return rule is not None and rule.begins


def _add_ends(tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Begin and end tokens around every text, where the file (or its kind's rule) asks for them."""
    begins = meta["tokenizer.ggml.model"] == "llama" or _rule_begins(meta)
    ids, tokens = special_ids(meta), meta["tokenizer.ggml.tokens"]
    wanted = {
        "bos": meta.get("tokenizer.ggml.add_bos_token", begins),
        "eos": meta.get("tokenizer.ggml.add_eos_token", False),
    }
    ends = {name: tokens[ids[name]] for name, wish in wanted.items() if wish and name in ids}
    before, after = ([ends[name]] if name in ends else [] for name in wanted)
    single, second = (
        [f"{part}:{i}" for part in (*before, side, *after)] for i, side in enumerate(("$A", "$B"))
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + second,
        special_tokens=[(token, ids[name]) for name, token in ends.items()],
    )

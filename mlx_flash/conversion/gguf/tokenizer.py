"""Tokenizer files from the metadata of a GGUF file.

Knows: the two kinds of vocabulary a llama GGUF carries, ``gpt2`` (byte-level BPE with merges) and
``llama`` (sentencepiece BPE with scores), and writes files that transformers, mlx-lm, tokenizers
and (second kind) sentencepiece load. Does not know: the file itself, other kinds of vocabulary,
chat templates beside the default one. The GGUF names only the rule that cuts text before BPE; a
name without an entry in ``PRE_TOKENIZERS`` is an error: a guess would give other ids than the
model was trained with. ``special_tokens_map.json`` is not written: nothing reads more from it than
``tokenizer_config.json`` says.

tokenizer.json of the second kind gives sentencepiece's ids with these exceptions, in which it does
as llama.cpp does: control and user-defined pieces are found in text, the text behind one gets a
space before it as the start of a text does, and pieces marked unused are never produced.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE

from mlx_flash.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of GGUF and sentencepiece
KINDS = ("gpt2", "llama")
UNSET = 0xFFFFFFFF  # how some files write "no such token"
# Names of end-of-turn tokens, for files whose metadata do not give its id.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
SPACE = "\u2581"  # how sentencepiece writes a space

_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_AND_LINES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cut(*patterns: str) -> pre.PreTokenizer:
    """Every match of a pattern is a word of its own; the words are cut by the next pattern."""
    cuts = [pre.Split(Regex(p), behavior="isolated") for p in patterns]
    return pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre -> (add_space_prefix -> pre-tokenizer). Only plain GPT-2 has a use for the
# prefix; in the others transformers and llama.cpp ignore it, and so does this.
PRE_TOKENIZERS: dict[str, Callable[[bool], pre.PreTokenizer]] = {
    "gpt-2": lambda prefix: pre.ByteLevel(add_prefix_space=prefix),
    "default": lambda _: _cut(r"[\p{P}$+<=>\^~|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "smollm": lambda _: pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda _: _cut(_WORDS_AND_LINES.format(digits="{1,3}")),
    "qwen2": lambda _: _cut(_WORDS_AND_LINES.format(digits="")),
}
PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3"), PRE_TOKENIZERS["llama-bpe"])
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def check(meta: dict[str, Any]) -> None:
    """Raises ModelError if ``write`` could not make a tokenizer of these metadata."""
    kind, name = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind not in KINDS:
        raise ModelError(f"tokenizer kind {kind!r}; supported: {', '.join(KINDS)}")
    if kind == "gpt2" and name not in PRE_TOKENIZERS:
        raise ModelError(
            f"tokenizer.ggml.pre is {name!r}; known: {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Convert the Hugging Face checkpoint, which has its own tokenizer.json"
        )
    if meta.get("tokenizer.ggml.precompiled_charsmap"):
        raise ModelError("tokenizer.ggml.precompiled_charsmap is set; expected none for a llama")
    lists = ["tokens", "token_type", "merges" if kind == "gpt2" else "scores"]
    sizes = {k: len(meta.get(f"tokenizer.ggml.{k}") or ()) for k in lists}
    same = {sizes[k] for k in lists if k != "merges"}
    if not sizes["tokens"] or len(same) > 1:
        raise ModelError(f"tokenizer lists of sizes {sizes}; expected one entry for each token")
    tokens = meta["tokenizer.ggml.tokens"]
    twice = [t for t, count in Counter(_texts(meta)).items() if count > 1]
    if twice or "" in tokens:
        raise ModelError(f"tokens that are empty or occur twice: {twice[:8] or ['']}")
    special = _special_ids(meta)
    if bad := {k: v for k, v in special.items() if v not in range(len(tokens))}:
        raise ModelError(f"special tokens {bad}; expected ids below {len(tokens)}")
    for name in ("bos", "eos"):
        if meta.get(f"tokenizer.ggml.add_{name}_token") and name not in special:
            raise ModelError(f"add_{name}_token is set; expected a {name}_token_id too")
    if kind == "gpt2":
        _merges(meta)
    elif (unknown := meta["tokenizer.ggml.token_type"].count(UNKNOWN)) != 1:
        raise ModelError(f"{unknown} tokens of type unknown; sentencepiece needs exactly one")


def config_ids(meta: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list if there are several) and pad_token_id, where known."""
    special, ends = _special_ids(meta), _end_ids(meta)
    ids: dict[str, Any] = {f"{k}_token_id": special[k] for k in ("bos", "pad") if k in special}
    return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def write(meta: dict[str, Any], out: Path, max_length: int) -> None:
    """Writes the tokenizer's files and generation_config.json into the directory ``out``."""
    check(meta)
    sentencepiece = meta["tokenizer.ggml.model"] == "llama"
    tokenizer = _scored(meta) if sentencepiece else _byte_level(meta)
    _add_tokens(tokenizer, meta)
    _add_ends(tokenizer, meta)
    tokenizer.save(str(out / "tokenizer.json"))
    tokens, special = meta["tokenizer.ggml.tokens"], _special_ids(meta)
    named = [k for k in ("bos", "eos", "unk", "pad") if k in special]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    } | {f"{name}_token": tokens[special[name]] for name in named}
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    _save(out / "tokenizer_config.json", config)
    _save(out / "generation_config.json", config_ids(meta))
    if sentencepiece:
        (out / "tokenizer.model").write_bytes(_proto(meta))


def _save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_ids(meta: dict[str, Any]) -> dict[str, int]:
    """bos, eos, unk, pad, eot and eom, as far as the file (or its kind's rule) gives them."""
    keys = {"unk": "unknown", "pad": "padding"}
    kinds_rule = {"bos": 1, "eos": 2, "unk": 0} if meta["tokenizer.ggml.model"] == "llama" else {}
    found = {
        k: meta.get(f"tokenizer.ggml.{keys.get(k, k)}_token_id", kinds_rule.get(k, UNSET))
        for k in ("bos", "eos", "unk", "pad", "eot", "eom")
    }
    return {k: v for k, v in found.items() if v != UNSET}


def _end_ids(meta: dict[str, Any]) -> list[int]:
    """Ids that end a generation: eos, then end of turn and end of message if they are others."""
    special = _special_ids(meta)
    ends = [special[k] for k in ("eos", "eot", "eom") if k in special]
    if "eot" not in special:
        template = meta.get("tokenizer.chat_template", "")
        tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
        named = [tokens.index(t) for t in TURN_ENDS if t in template and t in tokens]
        ends += [i for i in named if types[i] == CONTROL]
    return list(dict.fromkeys(ends))


def _texts(meta: dict[str, Any]) -> list[str]:
    """Tokens as tokenizer.json writes them: a user-defined one as it stands in text."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if meta["tokenizer.ggml.model"] != "llama":
        return tokens
    pairs = zip(tokens, types, strict=True)
    return [t.replace(SPACE, " ") if kind == USER_DEFINED else t for t, kind in pairs]


def _byte_level(meta: dict[str, Any]) -> Tokenizer:
    name = meta["tokenizer.ggml.pre"]
    vocab = {token: i for i, token in enumerate(_texts(meta))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(meta), ignore_merges=name in LLAMA3))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", False))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name](prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(meta: dict[str, Any]) -> list[tuple[str, str]]:
    known = set(meta["tokenizer.ggml.tokens"])
    merges = []
    for merge in meta["tokenizer.ggml.merges"]:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise ModelError(f"merge {merge!r}: both parts and the whole must be tokens")
        merges.append((left, right))
    return merges


def _scored(meta: dict[str, Any]) -> Tokenizer:
    texts, types = _texts(meta), meta["tokenizer.ggml.token_type"]
    model = BPE(
        vocab={token: i for i, token in enumerate(texts)},
        merges=_merges_by_score(meta),
        unk_token=texts[types.index(UNKNOWN)],
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    tokenizer = Tokenizer(model)
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*parts, decoders.Strip(content=" ", left=1, right=0)] if prefix else parts
    )
    return tokenizer


def _merges_by_score(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Sentencepiece joins the neighbours whose union scores highest; here, as ranked merges."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    scores = meta["tokenizer.ggml.scores"]
    normal = {t for t, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    order = sorted(range(len(tokens)), key=lambda i: -scores[i])
    return [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in order if types[i] == NORMAL)
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]


def _add_tokens(tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Control tokens become special ones and user-defined tokens added ones, with their ids."""
    pairs = list(zip(_texts(meta), meta["tokenizer.ggml.token_type"], strict=True))
    special = [AddedToken(t, normalized=False) for t, k in pairs if k in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in pairs if k == USER_DEFINED])


def _add_ends(tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Begin and end tokens around every text, where the file (or its kind's rule) asks for them."""
    begins = meta["tokenizer.ggml.model"] == "llama" or meta.get("tokenizer.ggml.pre") in LLAMA3
    ids, tokens = _special_ids(meta), meta["tokenizer.ggml.tokens"]
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


def _proto(meta: dict[str, Any]) -> bytes:
    """The sentencepiece model that the metadata came from, as far as encoding depends on it."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    lists = (meta[f"tokenizer.ggml.{k}"] for k in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*lists, strict=True):
        text = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        model.pieces.add(piece=text, score=score, type=kind)
    types, ids = meta["tokenizer.ggml.token_type"], _special_ids(meta)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(types)
    trainer.byte_fallback = BYTE in types
    for name in ("unk", "bos", "eos", "pad"):
        setattr(trainer, f"{name}_id", ids.get(name, -1))
        if name in ids:
            setattr(trainer, f"{name}_piece", meta["tokenizer.ggml.tokens"][ids[name]])
    normal = model.normalizer_spec
    normal.name = "identity"
    normal.add_dummy_prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    normal.remove_extra_whitespaces = False
    normal.escape_whitespaces = True
    return model.SerializeToString()

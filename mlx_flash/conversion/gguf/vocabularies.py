"""Vocabularies of GGUF files as tokenizers: byte-level BPE with merges, sentencepiece with scores.

Knows: how to make them of checked metadata. Does not know: which metadata are sound
(``tokenizer``).

The tokenizer of the second kind gives sentencepiece's ids with these exceptions, in which it does
as llama.cpp does: control and user-defined pieces are found in text, the text behind one gets a
space before it as the start of a text does, and pieces marked unused are never produced.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from mlx_flash.errors import ModelError

from .pre_tokenizers import PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of GGUF and sentencepiece
UNSET = 0xFFFFFFFF  # how some files write "no such token"
SPACE = "\u2581"  # how sentencepiece writes a space


def special_ids(meta: dict[str, Any]) -> dict[str, int]:
    """bos, eos, unk, pad, eot and eom, as far as the file (or its kind's rule) gives them."""
    keys = {"unk": "unknown", "pad": "padding"}
    kinds_rule = {"bos": 1, "eos": 2, "unk": 0} if meta["tokenizer.ggml.model"] == "llama" else {}
    found = {
        k: meta.get(f"tokenizer.ggml.{keys.get(k, k)}_token_id", kinds_rule.get(k, UNSET))
        for k in ("bos", "eos", "unk", "pad", "eot", "eom")
    }
    return {k: v for k, v in found.items() if v != UNSET}


def texts_of(meta: dict[str, Any]) -> list[str]:
    """Tokens as tokenizer.json writes them: a user-defined one as it stands in text."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if meta["tokenizer.ggml.model"] != "llama":
        return tokens
    pairs = zip(tokens, types, strict=True)
    return [t.replace(SPACE, " ") if kind == USER_DEFINED else t for t, kind in pairs]


def byte_level(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a vocabulary with merges."""
    name = meta["tokenizer.ggml.pre"]
    vocab = {token: i for i, token in enumerate(texts_of(meta))}
    rule = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges_of(meta), ignore_merges=rule.whole))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", False))
    tokenizer.pre_tokenizer = rule.make(prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merges_of(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of tokens in the order in which they are joined; ModelError for one of no tokens."""
    known = set(meta["tokenizer.ggml.tokens"])
    merges = []
    for merge in meta["tokenizer.ggml.merges"]:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise ModelError(f"merge {merge!r}: both parts and the whole must be tokens")
        merges.append((left, right))
    return merges


def scored(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a sentencepiece vocabulary."""
    texts, types = texts_of(meta), meta["tokenizer.ggml.token_type"]
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


def sentencepiece_model(meta: dict[str, Any]) -> bytes:
    """The sentencepiece model that the metadata came from, as far as encoding depends on it."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    lists = (meta[f"tokenizer.ggml.{k}"] for k in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*lists, strict=True):
        text = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        model.pieces.add(piece=text, score=score, type=kind)
    types, ids = meta["tokenizer.ggml.token_type"], special_ids(meta)
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

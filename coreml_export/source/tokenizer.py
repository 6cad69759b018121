"""The tokenizer of an export: always a tokenizer.json, whatever the model came with."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from coreml_export.errors import ExportError
from mlx_flash.calibration.text import DEFAULT as TEXT
from mlx_flash.common.json_reader import fields, read_json

from .weights_source import Source

GENERATION = "generation_config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def write(source: Source, out: Path) -> None:
    """Make a directory with the model's tokenizer files, tokenizer.json among them.

    Raises:
        ExportError: the model has no tokenizer, or one that tokenizer.json cannot be made from.
    """
    out.mkdir()
    source.write_tokenizer(out)
    if (out / "tokenizer.json").is_file():
        return
    old = next((name for name in SENTENCEPIECE if (out / name).is_file()), None)
    pair = (out / "vocab.json").is_file() and (out / "merges.txt").is_file()
    if old is None and not pair:
        raise ExportError(
            f"{source.path} has no tokenizer (tokenizer.json, or {', '.join(SENTENCEPIECE)}, or "
            "vocab.json and merges.txt); put the model's tokenizer files there"
        )
    from transformers import AutoTokenizer, LlamaTokenizer

    told = (out / "tokenizer_config.json").is_file()  # else llama's, which is then compared
    kind: Any = AutoTokenizer if told or not old else LlamaTokenizer
    try:
        fast: Any = kind.from_pretrained(str(out), use_fast=True, trust_remote_code=False)
        fast.backend_tokenizer.save(str(out / "tokenizer.json"))
    except Exception as error:  # of whatever library reads the old format
        raise ExportError(
            f"tokenizer.json cannot be made from {old or 'vocab.json'} of {source.path}: {error}"
        ) from error
    if old:
        _compare(source, out, old)


def _compare(source: Source, out: Path, old: str) -> None:
    """Raise ExportError unless tokenizer.json splits text as the sentencepiece model does."""
    from sentencepiece import SentencePieceProcessor

    text = TEXT.read_text(encoding="utf-8")[3000:6000] + " Größe: 3½ €"
    expected = SentencePieceProcessor(model_file=str(out / old)).encode(text)
    if load(out).encode(text, add_special_tokens=False).ids != expected:
        raise ExportError(
            f"the tokenizer.json made from {old} of {source.path} splits text differently from "
            f"{old}; put a tokenizer.json of the model there"
        )


def load(out: Path) -> Any:
    """The tokenizer of an export; ExportError where its file is damaged."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(out / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ExportError(f"{out / 'tokenizer.json'} cannot be read: {error}") from error


def ends(out: Path, config: dict[str, Any]) -> list[int]:
    """Tokens that end a text: those of generation_config.json among the files, else config.json's.

    As mlx-lm does, which generates.
    """
    found = None
    if (out / GENERATION).is_file():
        with contextlib.suppress(ValueError):
            found = fields(read_json(out / GENERATION), GENERATION).get("eos_token_id")
    found = found or config.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def sample(out: Path, count: int, start: int = 3000) -> list[int]:
    """Token numbers of real text: ``count`` tokens of Persuasion from a letter on."""
    text = TEXT.read_text(encoding="utf-8")
    begin = text.index(" ", start) + 1
    return load(out).encode(text[begin : begin + 16 * count + 1000]).ids[:count]

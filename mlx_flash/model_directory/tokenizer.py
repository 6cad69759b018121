"""Tokenizer files of a directory: held against limits, then read by mlx-lm and transformers.

Those libraries read what is there: a pipe waits for ever, an 8 GB file fills memory, and a
tokenizer that names code of its own (``auto_map``) is asked for on stdin unless one says that it is
never to be run. So it is said, and files are looked at first.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm import utils
from transformers import PreTrainedConfig

from mlx_flash.common.json_reader import (
    MAX_BYTES,
    check_values,
    fields,
    items,
    plain_name,
    read_json,
    read_text,
    show,
)
from mlx_flash.errors import FlashError, ModelError
from mlx_flash.models.registry import in_transformers

from .chat_template import bounded
from .config import MAX_CONFIG
from .links import check_link

# JSON that mlx-lm and transformers read; of other formats, what they may.
NAMES = (
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer*.json",
    "vocab.json",
    *("*.jinja", "*.model", "*.tiktoken", "*.txt"),
)
TRIAL = "A fox, 12 geese."
CONFIG = "tokenizer_config.json"
# Read as a whole by libraries; the largest published, with 262,144 tokens, has 33 MB.
LARGE = ("tokenizer.json", "vocab.json")
TEMPLATES = "additional_chat_templates"


def load_tokenizer(path: Path, config: dict[str, Any]) -> Any:
    """mlx-lm's tokenizer of a directory; code that comes with it is never run.

    Args:
        config: the directory's config.json.

    Raises:
        ModelError: its files cannot be read, go beyond the limits, or need code of their own.
    """
    said = check_files(path)
    try:
        # Where it does not know the model, transformers takes this, too, but warns of it.
        own = not in_transformers(config.get("model_type"))
        extra: dict[str, Any] = {"config": PreTrainedConfig()} if own else {}
        extra["trust_remote_code"] = False
        eos = utils.load_config(path).get("eos_token_id")
        found = utils.load_tokenizer(path, extra, eos_token_ids=eos)
        found.decode(found.encode(TRIAL))  # what types are wrong shows here
        found.apply_chat_template = bounded(found, path)
        return found
    except FlashError:
        raise
    except Exception as error:  # of libraries that these files drive
        if said.get("auto_map"):
            raise ModelError(
                f"the tokenizer of {path} is code of its own (auto_map in {CONFIG}: "
                f"{_code(said['auto_map'])}), which is never run; use a checkpoint with a "
                "tokenizer.json, or make one with transformers"
            ) from error
        raise ModelError(
            f"{path} cannot be loaded, its tokenizer files or config.json were changed: "
            f"{type(error).__name__}: {error!s:.500}; convert the model again"
        ) from error


def check_files(path: Path) -> dict[str, Any]:
    """Raise ModelError for tokenizer files that are no plain files, lead out, or are too large.

    Returns:
        tokenizer_config.json, empty where there is none.
    """
    said: dict[str, Any] = {}
    for file in _files(path):
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                raise ValueError("it is no plain file")
            check_link(file, path)
            if file.name in LARGE:
                check_values(read_text(file))  # not parsed here: it may have 33 MB
            elif file.suffix == ".json":
                found = read_json(file, MAX_CONFIG)
                if file.name == CONFIG:
                    said = _checked(fields(found, "it"))
            elif file.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has {file.stat().st_size:,} bytes, at most {MAX_BYTES:,} fit")
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, FlashError):
                raise
            raise ModelError(f"{file} cannot be read: {error}; get the model again") from error
    return said


def _files(path: Path) -> Iterator[Path]:
    """Files that libraries may take for the tokenizer's; links to nothing are left to them."""
    for folder in (path, path / TEMPLATES):
        for pattern in NAMES:
            for file in sorted(folder.glob(pattern)):
                if file.exists() and not file.is_dir():
                    yield file


def _checked(said: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json; ValueError where it names files that are not beside it."""
    key = "fast_tokenizer_files"
    for name in items(said.get(key) or [], key):
        plain_name(name, f"a name in {key}")
    return said


def _code(auto_map: Any) -> str:
    """The code that an ``auto_map`` names."""
    found = auto_map.get("AutoTokenizer", auto_map) if isinstance(auto_map, dict) else auto_map
    if isinstance(found, list):
        return ", ".join(show(name) for name in found if name)
    return show(found)

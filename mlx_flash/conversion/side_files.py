"""What lies beside a checkpoint's weights: its tokenizer, templates, licence, card.

They are looked at before the weights are: whether one is a pointer that Git LFS left in the file's
place, and whether the tokenizer loads and has a row in the embedding for each of its tokens.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_flash.common.files import written
from mlx_flash.common.json_reader import fields, read_json
from mlx_flash.errors import ConvertError, FlashError, FlashWarning, ModelError
from mlx_flash.model_directory.config import write_config
from mlx_flash.model_directory.links import check_link
from mlx_flash.model_directory.tokenizer import CONFIG, TEMPLATES, load_tokenizer
from mlx_flash.model_directory.writing import CALIBRATION

from .checkpoint import Checkpoint
from .tied_head import EMBEDDINGS

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "LICENSE*", "NOTICE*")
# Made anew, or, of those that ``calibrate`` writes, changed after conversion has hashed them.
RESERVED = ("calibration.*", "predictors.*", "experts.json", *CALIBRATION)
NOT_SIDE_FILES = ("config.json", "*.index.json", "*.safetensors*", *RESERVED)
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt")
TEMPLATE = "chat_template.jinja"
POINTER = b"version https://git-lfs.github.com/spec/"
READ = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")
LISTED = 3  # tokens named in a warning


def refuse_pointers(path: Path) -> None:
    """Raise ModelError for a file of a checkpoint that is a pointer of Git LFS."""
    for folder in (path, path / TEMPLATES):
        for file in sorted(file for pattern in READ for file in folder.glob(pattern)):
            if file.is_file():
                with open(file, "rb") as f:
                    begins = f.read(len(POINTER))
                if begins == POINTER:
                    raise ModelError(
                        f"{file} is a pointer of Git LFS, not the file itself; fetch it with "
                        f"git lfs pull, or download it again"
                    )


def side_files(path: Path) -> Iterator[Path]:
    """Files of a checkpoint that a model directory gets, too; no link is followed out of it."""
    for pattern in SIDE_FILES:
        for file in sorted(path.glob(pattern)):
            if file.is_file() and not any(file.match(p) for p in NOT_SIDE_FILES):
                check_link(file, path)
                yield file


def copy_side_files(path: Path, out: Path) -> None:
    """Copy them; chat templates that have a folder of their own go into tokenizer_config.json."""
    for file in side_files(path):
        shutil.copyfile(file, out / file.name)
    if templates := _templates(path):
        config = fields(read_json(out / CONFIG), CONFIG) if (out / CONFIG).is_file() else {}
        config["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (out / CONFIG).write_text(text + "\n", encoding="utf-8")
        (out / TEMPLATE).unlink(missing_ok=True)


def _templates(path: Path) -> dict[str, str]:
    """Name to template where a folder has some, as transformers reads them; else empty."""
    found = {}
    for file in sorted((path / TEMPLATES).glob("*.jinja")):
        check_link(file, path)
        found[file.stem] = file.read_text(encoding="utf-8")
    if found and (path / TEMPLATE).is_file():
        found = {"default": (path / TEMPLATE).read_text(encoding="utf-8"), **found}
    return found


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Load the tokenizer that the model directory will have, and try it.

    Warns of tokens that the embedding has no row for (FlashWarning).

    Raises:
        ModelError: there is none, or it does not load; names the checkpoint's file.
    """
    path = checkpoint.path
    with TemporaryDirectory(prefix="mlx_flash-") as folder:
        out = Path(folder)
        try:
            checkpoint.write_tokenizer(out)
        except OSError as error:
            if isinstance(error, FlashError):
                raise
            raise ConvertError(
                f"writing {written(error) or out} failed: {error.strerror}; the tokenizer is tried "
                "there: make room, or set TMPDIR to another folder"
            ) from error
        there = sorted({file.name for pattern in VOCABULARIES for file in out.glob(pattern)})
        if not there:
            raise ModelError(
                f"{path} has no tokenizer: expected tokenizer.json, tokenizer.model, vocab.json "
                "with merges.txt or the like beside the weights; get the model's tokenizer files"
            )
        write_config(out / "config.json", checkpoint.config)
        for file in sorted(out.glob("*.json")):
            _check_json(file, path)
        try:
            tokenizer = load_tokenizer(out, checkpoint.config)
            vocabulary = tokenizer.get_vocab()
        except FlashError as error:
            if error.__cause__ is None or "code of its own" in str(error):
                raise ModelError(str(error).replace(folder, str(path))) from error
            cause = f"{type(error.__cause__).__name__}: {error.__cause__!s:.300}"
            raise ModelError(
                f"the tokenizer of {path} ({', '.join(there)}) cannot be loaded: "
                f"{cause.replace(folder, str(path))}; get the model's tokenizer files again"
            ) from error
    rows = _embedding_rows(checkpoint)
    beyond = sorted((n, token) for token, n in vocabulary.items() if rows and n >= rows)
    if beyond:
        named = ", ".join(f"{n} {token!r:.40}" for n, token in beyond[:LISTED])
        more = ", ..." if len(beyond) > LISTED else ""
        warnings.warn(
            f"{path}: the model's embedding has {rows} rows, and its tokenizer has {len(beyond)} "
            f"tokens beyond them ({named}{more}); text with one of them will be refused",
            FlashWarning,
            stacklevel=2,
        )


def _check_json(file: Path, path: Path) -> None:
    try:
        read_json(file)
    except ValueError as error:
        raise ModelError(
            f"{path / file.name} is cut off or no JSON: {error!s:.200}; download it again"
        ) from error


def _embedding_rows(checkpoint: Checkpoint) -> int:
    """Tokens that the model's embedding has; 0 where it is not found."""
    names = tuple(f"{name}.weight" for name in EMBEDDINGS)
    found: list[Any] = [
        shape[0]
        for name, shape in checkpoint.shapes.items()
        if f".{name}".endswith(tuple(f".{n}" for n in names))
    ]
    return max(found, default=0)

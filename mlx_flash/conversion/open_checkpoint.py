"""Opens whatever a user names: a Hugging Face directory, a hub name or a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_lm import utils

from mlx_flash.errors import ModelError

from .adapter import Adapter
from .checkpoint import UNCHANGED, Checkpoint, RequestedFormat
from .gguf.checkpoint import GGUFCheckpoint
from .huggingface import HFCheckpoint

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(
    source: str | Path, requested: RequestedFormat = UNCHANGED, adapter: Adapter | None = None
) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory or a hub name ("org/name").

    Args:
        source: the file, the directory or the name.
        requested: what is to become of the numbers.
        adapter: what changes the model; a GGUF's tensors are made floats for it.

    Raises:
        ModelError: there is no such model, it is of a kind that is not read, or what is requested
            cannot be done.
        DamagedError: a file is cut off or cannot be read.
    """
    path = Path(source)
    try:
        is_file, exists = path.is_file(), path.exists()
    except OSError as error:
        raise ModelError(f"no such model: {source}: {error.strerror}") from error
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{path} is a file but no .gguf; expected a GGUF file, a Hugging Face directory "
                "or a hub name"
            )
        if requested.scheme:
            raise ModelError(
                f"{path}: a GGUF is not quantised anew; leave -q out (its Q4_0, Q4_1 and Q8_0 are "
                "kept as they are), or quantise the float checkpoint"
            )
        return GGUFCheckpoint(path, requested.dtype, requested.dequantize, adapter)
    if not exists:
        path = _download(str(source))
    return HFCheckpoint(path, requested, adapter)


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name) or name.lower().endswith(".gguf"):
        raise ModelError(
            f"no such model: {name!r} is neither a file, nor a directory, nor a hub name (org/name)"
        )
    from huggingface_hub import snapshot_download

    patterns = [*utils.DEFAULT_ALLOW_PATTERNS, "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own, its HTTP library's, the disk's: all are no model
        raise ModelError(
            f"no such model: {name!r} is not a directory here and could not be fetched from the "
            f"Hugging Face hub: {error}"
        ) from error

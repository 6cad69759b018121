"""The header of a safetensors file: reading and making it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_flash.common.sizes import round_up
from mlx_flash.errors import DamagedError

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header, its ``__metadata__`` included, and the byte at which the data start.

    Raises:
        ValueError: the file does not begin with such a header; says why not.
        OSError: it cannot be read.
    """
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        text = f.read(size) if size <= MAX_HEADER else b""
    if not size or len(text) != size:
        raise ValueError(f"its header of {size} bytes is cut off or too long")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"its header is {found!r:.80}, expected an object")
    return found, 8 + size


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file and where its data start; DamagedError for any other file."""
    try:
        found, start = read_header(path)
    except ValueError as error:
        raise DamagedError(
            f"{path} is no safetensors file: {error}; copy it again or convert the model again"
        ) from error
    found.pop("__metadata__", None)
    return found, start


def header_bytes(content: dict[str, Any], alignment: int = 8) -> bytes:
    """The first bytes of a safetensors file; data that follow start on a multiple of a size.

    Args:
        content: name -> dtype, shape and data_offsets; ``__metadata__``.
        alignment: that size, at least 8.
    """
    text = json.dumps(content, separators=(",", ":")).encode()
    size = round_up(8 + len(text), alignment) - 8
    return size.to_bytes(8, "little") + text.ljust(size)

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


def read_entries(path: Path) -> tuple[dict[str, Any], int]:
    """``read_header`` without ``__metadata__``, its entries checked.

    Each has a dtype, a shape of whole numbers and ``data_offsets`` (begin, end) in order. That the
    file is as long as they say is for the caller to check, see ``data_end``.

    Raises ValueError, which says what is wrong, and OSError.
    """
    found, start = read_header(path)
    found.pop("__metadata__", None)
    for name, entry in found.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = isinstance(dtype, str) and isinstance(shape, list)
            sound = sound and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (LookupError, TypeError, ValueError):
            sound = False
        if not sound or begin > end:
            raise ValueError(f"its header says of tensor {name!r:.80}: {entry!r:.200}")
    return found, start


def data_end(entries: dict[str, Any], start: int) -> int:
    """Bytes that a file must have to hold all of ``read_entries``."""
    return start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)


def header(path: Path) -> tuple[dict[str, Any], int]:
    """``read_entries`` of a model's own file; DamagedError for any other file, or one cut off."""
    try:
        found, start = read_entries(path)
        if (expected := data_end(found, start)) > (size := path.stat().st_size):
            raise ValueError(f"it has {size} bytes, its header says {expected}")
    except ValueError as error:
        raise DamagedError(
            f"{path} is not a safetensors file or damaged: {error}; copy it again or convert the "
            "model again"
        ) from error
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

"""The header of a safetensors file: read, held against the format's rules and the file, made.

The rules are those of the format's own library: names are there once, types are known, a tensor has
the bytes that its shape says, and tensors lie one behind the other from the first byte behind the
header to the last of the file. Where one does not hold, bytes could be read as other numbers than
were written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_flash.common.json_reader import parse_json
from mlx_flash.common.sizes import round_up
from mlx_flash.errors import DamagedError

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_DEPTH = 16  # of a header's objects; those that are written have 3
MAX_AXES = 64  # of a tensor
# Bits of a number, by the format's name of its type.
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


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
    found = parse_json(text, unique=True, finite=True, max_depth=MAX_DEPTH)
    if not isinstance(found, dict):
        raise ValueError(f"its header is {found!r:.80}, expected an object")
    return found, 8 + size


def read_entries(path: Path) -> tuple[dict[str, Any], int]:
    """``read_header`` without ``__metadata__``, held against the format's rules.

    Each entry has a dtype, a shape of whole numbers and ``data_offsets`` (begin, end). That the
    file is as long as they say is for the caller to check, see ``data_end``.

    Raises ValueError, which says what is wrong, and OSError.
    """
    found, start = read_header(path)
    found.pop("__metadata__", None)
    _check_entries(found)
    return found, start


def data_end(entries: dict[str, Any], start: int) -> int:
    """Bytes that a file of ``read_entries`` must have, no more and no less."""
    return start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)


def check_file(path: Path) -> tuple[dict[str, Any], int]:
    """``read_entries`` of a file that is just as long as they say; the same errors."""
    found, start = read_entries(path)
    if (expected := data_end(found, start)) != (size := path.stat().st_size):
        raise ValueError(f"it has {size} bytes, its header says {expected}")
    return found, start


def _check_entries(entries: Mapping[str, Any]) -> None:
    """Raise ValueError unless tensors are as the format wants them."""
    spans = []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MAX_AXES
            sound = sound and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (LookupError, TypeError, ValueError):
            sound = False
        if not sound or begin > end:
            raise ValueError(f"its header says of tensor {name!r:.80}: {entry!r:.200}")
        if dtype not in BITS:
            raise ValueError(f"tensor {name!r:.80} is of type {dtype!r:.40}, which is not known")
        if 8 * (end - begin) != math.prod(shape) * BITS[dtype]:
            raise ValueError(
                f"tensor {name!r:.80} has {end - begin} bytes, which {dtype} of shape "
                f"{shape!r:.80} does not fill"
            )
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            wrong = "overlaps the one before it" if begin < at else "leaves a hole before it"
            raise ValueError(f"tensor {name!r:.80} at byte {begin} {wrong}, expected at {at}")
        at = end


def header(path: Path) -> tuple[dict[str, Any], int]:
    """``check_file`` of a model's own file, with DamagedError, which names it, for any error."""
    try:
        return check_file(path)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(
            f"{path} is not a safetensors file or damaged: {error}; copy it again or convert the "
            "model again"
        ) from error


def header_bytes(content: dict[str, Any], alignment: int = 8) -> bytes:
    """The first bytes of a safetensors file; data that follow start on a multiple of a size.

    Args:
        content: name -> dtype, shape and data_offsets; ``__metadata__``.
        alignment: that size, at least 8.
    """
    text = json.dumps(content, separators=(",", ":")).encode()
    size = round_up(8 + len(text), alignment) - 8
    return size.to_bytes(8, "little") + text.ljust(size)

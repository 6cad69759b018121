"""The header of a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_flash.errors import DamagedError


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file and where its data start; DamagedError for any other file."""
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            found = json.loads(f.read(min(size, 1 << 26)))
        found.pop("__metadata__", None)
        return found, 8 + size
    except (ValueError, AttributeError) as error:
        raise DamagedError(
            f"{path} is no safetensors file: {error}; copy it again or convert the model again"
        ) from error

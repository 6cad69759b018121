"""What is kept in the user's cache folder: JSON-ready values under a file's name and a key."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from .files import atomic_write
from .json_reader import fields, read_json
from .platform import current_platform


def recall(name: str, key: str) -> Any:
    """What ``remember`` kept, or None; a file that cannot be read counts as none."""
    path = current_platform().cache_folder() / name
    with contextlib.suppress(OSError, ValueError):
        return fields(read_json(path), "it").get(key)
    return None


def remember(name: str, key: str, value: Any) -> bool:
    """Keep a JSON-ready value; False where it could not be written. The file stays whole."""
    path = current_platform().cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = read_json(path)
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        atomic_write(path, json.dumps(known | {key: value}))
    except OSError:
        return False
    return True

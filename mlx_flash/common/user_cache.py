"""What is kept in the user's cache folder, and the machine that it was measured on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from .files import atomic_write


def cache_directory(platform_name: str = sys.platform) -> Path:
    """Where the user's caches are on this system, and ours among them; not made."""
    if platform_name == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_flash"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "mlx_flash"


def machine_name() -> str:
    """Processor, cores and system, for people and for keys."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line for line in lines if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def recall(name: str, key: str) -> Any:
    """What ``remember`` kept, or None; a file that cannot be read counts as none."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return json.loads((cache_directory() / name).read_text(encoding="utf-8")).get(key)
    return None


def remember(name: str, key: str, value: Any) -> bool:
    """Keep a JSON-ready value; False where it could not be written. The file stays whole."""
    path = cache_directory() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        atomic_write(path, json.dumps(known | {key: value}))
    except OSError:
        return False
    return True

"""A directory for code that looks for files in it by pattern, as mlx-lm's loader does.

mlx-lm joins directory and pattern to one string and globs that, so a directory named
``model [4-bit]`` is itself taken for a pattern. Here its own name is escaped in such a string.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any


class LiteralPath(type(Path())):
    """A path whose name stays literal where a pattern is joined to it."""

    def __truediv__(self, key: Any) -> Path:
        if glob.has_magic(str(key)):
            return Path(glob.escape(str(self))) / key
        return Path(super().__truediv__(key))

"""Which tensor is stored in how many bits.

A recipe is a table of (pattern of a tensor's name, scheme); the first that matches counts. Tensors
that do not fit a scheme fall back: int4 and palettes to int8, vectors and small tensors to fp16.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Sequence
from pathlib import Path

from coreml_export.errors import ExportError

from .formats import BLOCK, PALETTE_ROWS

SCHEMES = ("fp16", "int8", "int4", "palette4")
SMALL = 4096  # numbers; quantising fewer saves nothing
# --quant -> scheme of every matrix.
QUANT = {"none": "fp16", "int8": "int8", "int4": "int4", "palette4": "palette4"}

Recipe = Sequence[tuple[str, str]]


def recipe(quant: str, table: str | Path | None = None) -> Recipe:
    """The recipe of ``--quant``, after the rows of a table file of {pattern: scheme}.

    Raises:
        ExportError: ``quant`` is unknown, or the file is not such a table.
    """
    if quant not in QUANT:
        raise ExportError(f"--quant {quant!r}; expected one of {', '.join(QUANT)}")
    rows: list[tuple[str, str]] = []
    if table is not None:
        try:
            found = json.loads(Path(table).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{table} is not a table of schemes: {error}") from error
        if not isinstance(found, dict) or any(v not in SCHEMES for v in found.values()):
            raise ExportError(
                f"{table} is not a table of schemes; expected a JSON object of tensor name "
                f"patterns, each with one of {', '.join(SCHEMES)}"
            )
        rows = list(found.items())
    return [*rows, ("*", QUANT[quant])]


def scheme_of(name: str, shape: tuple[int, ...], chosen: Recipe) -> str:
    """The scheme that a recipe gives a tensor of this name and shape."""
    wanted = next((s for pattern, s in chosen if fnmatch.fnmatchcase(name, pattern)), "fp16")
    if wanted == "fp16" or len(shape) != 2 or math.prod(shape) < SMALL:
        return "fp16"
    if wanted == "int4" and shape[1] % BLOCK:
        return "int8"
    if wanted == "palette4" and shape[0] % PALETTE_ROWS:
        return "int8"
    return wanted

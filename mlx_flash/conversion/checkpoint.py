"""A checkpoint to convert: Hugging Face directories, hub names, and which file is a GGUF.

A checkpoint has ``config``, ``shapes`` and ``dtypes`` by mlx-lm's weight names, a ``fingerprint``,
``predictors`` that ship with it, ``take(name)`` which reads one tensor, and ``write_tokenizer``. A
quantised tensor is several, under mlx-lm's names (see ``quantization``). ``GGUFCheckpoint`` is the
other one.

Knows: files of a checkpoint, mlx-lm's ``sanitize``. Does not know: rows, where they go.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_flash.errors import ModelError
from mlx_flash.models.dtypes import FLOATS
from mlx_flash.models.quantized_rows import QuantScheme


class Checkpoint(Protocol):
    """What conversion needs of a source."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, mx.Dtype]
    fingerprint: str
    predictors: dict[str, mx.array]
    row_scheme: QuantScheme | None  # how neurons' down columns are to be quantised, gate and up are

    def take(self, name: str) -> mx.array:
        """One tensor, evaluated; each name once."""

    def write_tokenizer(self, out: Path) -> None:
        """Put tokenizer files, licence and card into a directory."""


@dataclass(frozen=True)
class Packing:
    """What becomes of a checkpoint's numbers.

    Args:
        dtype: float16, bfloat16 or float32 to cast floats to; None keeps the checkpoint's.
        scheme: how to quantise; None leaves numbers as they are.
        recipe: one of mlx-lm's mixed recipes, more bits for some layers.
        dequantize: make floats of a quantised checkpoint.
    """

    dtype: str | None = None
    scheme: QuantScheme | None = None
    recipe: str | None = None
    dequantize: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in FLOATS:
            raise ModelError(f"dtype {self.dtype!r} is not one of {', '.join(FLOATS)}")
        if self.scheme and self.dequantize:
            raise ModelError("quantise or dequantise, not both")
        if self.recipe and not self.scheme:
            raise ModelError(f"recipe {self.recipe} is for quantising; ask for that, too (-q)")


AS_IT_IS = Packing()

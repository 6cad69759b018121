"""What conversion needs of a source, and what is asked of its numbers.

``HFCheckpoint`` and ``GGUFCheckpoint`` are the two kinds. Three quantisations are told apart: the
source's, which ``config["quantization"]`` describes in mlx-lm's convention (see ``quantization``);
the requested one; and that of rows which are quantised one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_flash.errors import ModelError
from mlx_flash.models.dtypes import FLOATS
from mlx_flash.models.quantized_rows import QuantScheme

from .model_spec import ModelSpec


@dataclass(frozen=True)
class CheckpointFacts:
    """What only some checkpoints have.

    Args:
        predictors: tensors of predictors that ship with the checkpoint, as ``turbosparse.fold``
            takes them.
        row_scheme: how every neuron's row is quantised by itself: gate and up are quantised
            already, down is still floats, since its columns become parts of rows. None where rows
            hold numbers as the tensors do.
        requantised: type that MLX lacks -> (tensors, bits, group size) that it was quantised to
            anew, which adds an error of its own.
    """

    predictors: Mapping[str, mx.array] = field(default_factory=dict)
    row_scheme: QuantScheme | None = None
    requantised: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


class Checkpoint(Protocol):
    """A model's tensors under mlx-lm's names.

    Attributes:
        path: where it lies.
        config: config.json of the model.
        spec: where its FFNs are.
        shapes, dtypes: of every tensor by its name; a quantised one is several, see
            ``quantization``.
        fingerprint: differs where the source has changed.
        facts: what only some checkpoints have.
    """

    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, mx.Dtype]
    fingerprint: str
    facts: CheckpointFacts

    def take(self, name: str) -> mx.array:
        """One tensor, evaluated; a checkpoint may give each name only once."""

    def write_tokenizer(self, out: Path) -> None:
        """Put tokenizer files, licence and card into a directory."""


@dataclass(frozen=True)
class RequestedFormat:
    """What is to become of a checkpoint's numbers.

    Args:
        dtype: float16, bfloat16 or float32 to cast floats to; None keeps the checkpoint's.
        scheme: how to quantise; None keeps numbers as they are.
        quant_predicate: one of mlx-lm's mixed recipes, which give some layers more bits.
        dequantize: make floats of a quantised checkpoint.
        allow_nonfinite: keep weights that are NaN or infinite, instead of refusing them.

    Raises:
        ModelError: the dtype is unknown, or the wishes contradict each other.
    """

    dtype: str | None = None
    scheme: QuantScheme | None = None
    quant_predicate: str | None = None
    dequantize: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in FLOATS:
            raise ModelError(f"dtype {self.dtype!r} is not one of {', '.join(FLOATS)}")
        if self.scheme and self.dequantize:
            raise ModelError("quantise or dequantise, not both")
        if self.quant_predicate and not self.scheme:
            raise ModelError(
                f"recipe {self.quant_predicate} is for quantising; ask for that, too (-q)"
            )


UNCHANGED = RequestedFormat()

"""What a predictor is: a function of an FFN's input that names the rows to have in memory.

Every kind subclasses ``Predictor`` in a module of its own: ``low_rank``, ``resident_part``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_flash.models.quantized_rows import Rows


class Projection(NamedTuple):
    """The projection that an FFN's activation is applied to, in memory.

    Args:
        part: "gate", or "up" of an FFN without a gate.
        weight: [rows, d_model], as ``nn.Linear`` holds it, or the same packed.
        bias: [rows] or None.
    """

    part: str
    weight: Rows
    bias: mx.array | None


@dataclass
class Prediction:
    """What a predictor says of some tokens.

    Args:
        rows: sorted, distinct row numbers, int64 [n]: what at least one of the tokens needs.
        values: where the predictor has computed a projection exactly, its output [..., all rows],
            zero where a token does not need the row; else None.
    """

    rows: np.ndarray
    values: mx.array | None = None


class Predictor(ABC):
    """Hidden state -> rows.

    A kind defines ``mask``; the rest has defaults.

    Attributes:
        kind: its name for users.
        exact: no row that fires is ever missed, so tokens are those of the dense model.
        provides: the part of a row that ``values`` stand for, which need not be read; None where
            the predictor computes no projection.
        nbytes: memory its weights take.
    """

    kind: str
    exact: bool = False
    provides: str | None = None
    nbytes: int = 0

    @abstractmethod
    def mask(self, x: mx.array, values: mx.array | None = None) -> mx.array:
        """Which rows each token needs, bool [..., rows].

        Args:
            x: input of the FFN's projections, [..., d_model].
            values: output of the projection that the activation is applied to, [..., rows], where
                the caller has it; None to have it computed, if it is needed.
        """

    def values(self, x: mx.array) -> mx.array:
        """Output of the part that the predictor provides, [..., rows], all rows of it."""
        raise NotImplementedError

    def __call__(self, x: mx.array) -> Prediction:
        """Predict for x [..., d_model]; evaluates the mask."""
        return Prediction(union(self.mask(x)))


class Everything(Predictor):
    """Every row for every token: a layer that no predictor serves well."""

    kind = "none"
    exact = True

    def __init__(self, rows: int) -> None:
        self._rows = np.arange(rows)

    def mask(self, x: mx.array, values: mx.array | None = None) -> mx.array:
        """See ``Predictor``."""
        return mx.ones((*x.shape[:-1], self._rows.size), mx.bool_)

    def __call__(self, x: mx.array) -> Prediction:
        return Prediction(self._rows)


def union(mask: mx.array) -> np.ndarray:
    """Row numbers that are set for any token of a bool mask [..., rows]; evaluates it."""
    if mask.size > mask.shape[-1]:
        mask = mx.any(mask.reshape(-1, mask.shape[-1]), axis=0)
    return np.flatnonzero(np.array(mask.reshape(-1), copy=False))

"""Codes whose rounding errors make up for each other, from what a layer's inputs look like.

Rounding a matrix number by number keeps the numbers near; what counts is the product. With H the
second moments of a layer's inputs on real text, the columns are rounded one after the other, those
of the largest inputs first, and the error of each is taken out of those to come, by what H says
they have in common (GPTQ, arXiv 2210.17323). Scales are chosen beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .formats import BLOCK, TINY, QuantizedRows

DAMPING = 0.01  # of H's mean diagonal, added to it
ROWS = 8192  # worked on at once
COLUMNS = 64  # whose errors are taken out of the later ones together
LIMITS = {"int4": (-8, 7), "int8": (-127, 127)}
# Scales that are tried, as shares of the one that just holds the largest number of a group.
FACTORS = {"int4": np.linspace(1.0, 0.7, 7), "int8": np.linspace(1.0, 0.8, 5)}


def compensated(
    array: np.ndarray, moments: np.ndarray, scheme: str, edges: Sequence[int]
) -> list[QuantizedRows]:
    """A matrix [out, in] quantised by GPTQ, cut along its input.

    Args:
        array: float32.
        moments: mean of x x^T over the layer's inputs, [in, in].
        scheme: int4 (a scale for a block of 32) or int8 (one for each piece).
        edges: where pieces begin and, last, the width.
    """
    starts = list(range(0, edges[-1], BLOCK)) if scheme == "int4" else list(edges[:-1])
    sizes = np.diff([*starts, edges[-1]])
    diagonal = np.diagonal(moments)
    extra = DAMPING * max(float(diagonal.mean()), 1e-12)
    order = np.argsort(-diagonal, kind="stable")
    upper = _factor(moments[np.ix_(order, order)], extra)
    pieces = []
    for i in range(0, len(array), ROWS):
        left = np.array(array[i : i + ROWS].T, np.float32, order="C")  # a column lies together
        weight = (diagonal + extra).astype(np.float32)
        scales = np.stack(
            [
                _scale(left[a:b], weight[a:b], scheme)
                for a, b in itertools.pairwise([*starts, edges[-1]])
            ]
        )
        codes = np.empty(left.shape, np.int8)
        wide = np.repeat(scales.astype(np.float32), sizes, axis=0)[order]
        codes[order] = _codes(left[order], wide, upper, scheme)
        pieces.append((codes.T, scales.T))
    codes, scales = (np.concatenate(part) for part in zip(*pieces, strict=True))
    found = []
    for a, b in itertools.pairwise(edges):
        within = [n for n, start in enumerate(starts) if a <= start < b]
        whole = np.ascontiguousarray(codes[:, a:b]), np.ascontiguousarray(scales[:, within])
        found.append(QuantizedRows(scheme, *whole))
    return found


def _factor(moments: np.ndarray, extra: float) -> np.ndarray:
    """U, upper triangular, with U^T U the inverse of the damped moments."""
    whole = moments.astype(np.float64)
    whole[np.diag_indices(len(whole))] += extra
    return np.linalg.cholesky(np.linalg.inv(whole)).T.astype(np.float32)


def _codes(left: np.ndarray, scales: np.ndarray, upper: np.ndarray, scheme: str) -> np.ndarray:
    """Round [in, rows] column by column; ``left`` is used up."""
    low, high = LIMITS[scheme]
    pivots = np.diagonal(upper)
    codes = np.empty(left.shape, np.int8)
    for j in range(0, len(left), COLUMNS):
        end = min(j + COLUMNS, len(left))
        errors = np.empty((end - j, left.shape[1]), np.float32)
        for i in range(j, end):
            code = np.clip(np.rint(left[i] / scales[i]), low, high)
            codes[i] = code
            errors[i - j] = (left[i] - code * scales[i]) / pivots[i]
            if i + 1 < end:
                left[i + 1 : end] -= upper[i, i + 1 : end, None] * errors[i - j]
        left[end:] -= upper[j:end, end:].T @ errors
    return codes


def _scale(group: np.ndarray, weight: np.ndarray, scheme: str) -> np.ndarray:
    """For each column of [in, rows] the scale of the least weighted square error, fp16."""
    low, high = LIMITS[scheme]
    least, most = group.min(axis=0), group.max(axis=0)
    extreme = np.where(-least > most, least, most)
    best = chosen = None
    for sign in (1, -1) if scheme == "int4" else (1,):  # -8 or 8 - 1 for the largest number
        for factor in FACTORS[scheme]:
            trial = extreme * np.float32(sign * factor / low)
            trial = np.where(np.abs(trial) < TINY, TINY, trial).astype(np.float16)
            wide = trial.astype(np.float32)
            found = group * (1 / wide)
            np.rint(found, out=found)
            np.clip(found, low, high, out=found)
            found *= wide
            found -= group
            np.square(found, out=found)
            error = weight @ found
            if best is None:
                best, chosen = error, trial
                continue
            better = error < best
            best = np.where(better, error, best)
            chosen = np.where(better, trial, chosen)
    return chosen

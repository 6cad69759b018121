"""Arithmetic of low-rank predictors: matrices fitted to recorded arrays, scores to cut at.

A low-rank predictor starts from the closed form: the projection that decides which rows are active
(gate, or up where there is no gate), cut to its rank in the metric of the inputs' covariance
(reduced-rank regression), every row scaled by how well that rank knows it, so that its score is
the logit of the row being active, were the inputs normally distributed. AdamW then goes on from
there with the balanced loss of Deja Vu (2310.17157): cross entropy, weight y * (1 - w) + w.

It is written once for numpy and MLX: on a GPU it runs in MLX, elsewhere in numpy, whose matmuls are
some twenty times as fast as those of MLX's CPU wheel on Linux.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.errors import CalibrationError

BATCH = 256  # tokens a step: on short texts more, smaller steps got further than Deja Vu's 1024
EPOCHS = 2
RATE = 1e-2
DECAY = 0.01
BETAS = (0.9, 0.99)
LOGIT = 1.702  # sigmoid(LOGIT * z) is close to the normal distribution function of z
LEAST_DOUBT = 0.1  # error, in standard deviations, that even a full rank is assumed to have
MAX_LOGIT = 20.0  # above this a sigmoid is too close to 1 to recover its argument

Batch = tuple[np.ndarray, np.ndarray]  # x float32 [n, d_model], active bool [n, rows]
Batches = Callable[[np.ndarray], Batch]  # token numbers -> batch


def backend() -> ModuleType:
    """MLX where it computes on a GPU, else numpy."""
    return mx if mx.default_device().type == mx.DeviceType.gpu else np


@dataclass
class Matrices:
    """A low-rank predictor in float32: first [rank, d_model], second [rows, rank], bias [rows]."""

    first: np.ndarray
    second: np.ndarray
    bias: np.ndarray

    @property
    def rank(self) -> int:
        """Width between the matrices."""
        return self.first.shape[0]


@dataclass
class Moments:
    """Statistics of a layer's inputs.

    Args:
        mean: [d_model].
        covariance: [d_model, d_model].
        rate: share of the tokens that each row fires for, [rows].
    """

    mean: np.ndarray
    covariance: np.ndarray
    rate: np.ndarray


def moments(batches: Batches, tokens: int) -> Moments:
    """Moments over all tokens."""
    xp = backend()
    mean: Any = 0.0
    square: Any = 0.0
    fired: Any = 0.0
    for index in _chunks(tokens):
        x, active = batches(index)
        mean = mean + x.sum(axis=0, dtype=np.float64)
        fired = fired + active.sum(axis=0)
        x = xp.array(x)
        square = square + np.array(x.T @ x).astype(np.float64)
    mean = mean / tokens
    return Moments(mean, square / tokens - np.outer(mean, mean), fired / tokens)


def _chunks(tokens: int) -> Iterator[np.ndarray]:
    for start in range(0, tokens, BATCH):
        yield np.arange(start, min(start + BATCH, tokens))


class ClosedForm:
    """The best linear predictors of every rank.

    Args:
        weights: projections [rows, d_model] that have to be above ``offset`` for a row to be
            active: one, or gate and up for dReLU.
        biases: theirs, [rows] or None.
        offset: where the activation begins to let through (fatrelu).
        found: moments of the inputs.
        largest: rank.
    """

    def __init__(
        self,
        weights: list[np.ndarray],
        biases: list[np.ndarray | None],
        offset: float,
        found: Moments,
        largest: int,
    ) -> None:
        d_model = weights[0].shape[1]
        ridge = 1e-4 * max(float(np.trace(found.covariance)) / d_model, 1e-30)
        factor = np.linalg.cholesky(found.covariance + ridge * np.eye(d_model))
        whiten = factor.astype(np.float32)
        # Each projection in units of its own deviation, as a function of whitened inputs.
        spread = [_spread(weight @ whiten) for weight in weights]
        centres = [
            (weight @ found.mean + (0.0 if bias is None else bias) - offset) / deviation
            for weight, bias, deviation in zip(weights, biases, spread, strict=True)
        ]
        # Where two projections both have to be positive, the one that rarely is says more.
        joint = sum(
            weight * (_pull(centre) / deviation)[:, None]
            for weight, centre, deviation in zip(weights, centres, spread, strict=True)
        ).astype(np.float32)
        turned = joint @ whiten
        deviation = _spread(turned)
        turned /= deviation[:, None]
        centre = centres[0] if len(weights) == 1 else _probit(found.rate)
        # A row whose value is rarely near zero needs less of the rank.
        care = np.maximum(np.exp(-np.square(np.clip(centre, -4, 4)) / 4), 0.1).astype(np.float32)
        turned *= care[:, None]
        _, vectors = np.linalg.eigh((turned.T @ turned).astype(np.float64))
        vectors = np.ascontiguousarray(vectors[:, ::-1][:, :largest])
        # hidden = V^T L^-1 (x - mean) has variance 1.
        self._first = np.linalg.solve(factor.T, vectors).T.astype(np.float32)
        self._second = turned @ vectors.astype(np.float32) / care[:, None]
        self._centre = centre.astype(np.float32)
        self._mean = found.mean.astype(np.float32)
        self._shift = -math.log(balance(float(found.rate.mean())))

    def cut(self, rank: int, nonlinearity: str = "none") -> Matrices:
        """The best predictor of a rank; with a ReLU between, pairs of opposite signs are linear."""
        linear = rank if nonlinearity == "none" else (rank + 1) // 2
        first, second = self._first[:linear], self._second[:, :linear]
        known = np.square(second).sum(axis=1)
        doubt = np.sqrt(np.maximum(1 - known, LEAST_DOUBT**2))
        slope = (LOGIT / doubt).astype(np.float32)
        second = second * slope[:, None]
        bias = slope * self._centre - second @ (first @ self._mean) + np.float32(self._shift)
        if nonlinearity != "none":
            first = np.concatenate([first, -first])[:rank]
            second = np.concatenate([second, -second], axis=1)[:, :rank]
        return Matrices(np.ascontiguousarray(first), np.ascontiguousarray(second), bias)


def _spread(turned: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt(np.square(turned).sum(axis=1)), 1e-12)


def _pull(centre: np.ndarray) -> np.ndarray:
    """How far a normal variable of this mean lies above it, on average, where it is positive."""
    normal = NormalDist()
    near = np.clip(centre, -5.0, 5.0)
    return np.array([normal.pdf(c) / normal.cdf(c) for c in near])


def _probit(rate: np.ndarray) -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf(p) for p in np.clip(rate, 1e-5, 1 - 1e-5)])


def balance(rate: float) -> float:
    """Deja Vu's weight of an inactive entry, where this share of entries is active."""
    return min(1.0, float(rate) + 0.005)


def train(
    start: Matrices,
    batches: Batches,
    tokens: int,
    *,
    seed: list[int],
    nonlinearity: str = "none",
    epochs: int = EPOCHS,
    rate: float = RATE,
) -> Matrices:
    """Fine-tune a predictor.

    Args:
        start: where to begin.
        batches: gives inputs and labels of tokens.
        tokens: how many there are.
        seed: of the shuffling.
        rate: learning rate at the beginning; it falls to 0 along a cosine.

    Raises:
        CalibrationError: the loss is infinite or not a number.
    """
    xp = backend()
    relu = nonlinearity == "relu"
    values = [xp.array(v) for v in (start.first, start.second, start.bias)]
    means = [xp.zeros_like(v) for v in values]
    squares = [xp.zeros_like(v) for v in values]
    random = np.random.default_rng(seed)
    steps = epochs * -(-tokens // BATCH)
    step = 0
    for _ in range(epochs):
        order = random.permutation(tokens)
        for begin in range(0, tokens, BATCH):
            x, active = batches(np.sort(order[begin : begin + BATCH]))
            y = xp.array(active.astype(np.float32))
            loss, grads = gradients(xp, values, xp.array(x), y, balance(active.mean()), relu)
            step += 1
            now = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            for i, grad in enumerate(grads):
                means[i] = BETAS[0] * means[i] + (1 - BETAS[0]) * grad
                squares[i] = BETAS[1] * squares[i] + (1 - BETAS[1]) * xp.square(grad)
                mean = means[i] / (1 - BETAS[0] ** step)
                square = squares[i] / (1 - BETAS[1] ** step)
                decay = DECAY * values[i] if values[i].ndim > 1 else 0.0
                values[i] = values[i] - now * (mean / (xp.sqrt(square) + 1e-8) + decay)
            if xp is mx:
                mx.eval(values, means, squares)
            if not math.isfinite(float(loss)):
                raise CalibrationError(f"the loss is {float(loss)} at step {step} of {steps}")
    return Matrices(*(np.array(v, np.float32) for v in values))


def gradients(
    xp: ModuleType, values: list[Any], x: Any, y: Any, weight: float, relu: bool
) -> tuple[Any, list[Any]]:
    """Balanced cross entropy and its gradients with respect to first, second and bias."""
    first, second, bias = values
    linear = x @ first.T
    hidden = xp.maximum(linear, 0.0) if relu else linear
    scores = hidden @ second.T + bias
    small = xp.exp(-xp.abs(scores))
    entropy = xp.maximum(scores, 0.0) - scores * y + xp.log1p(small)
    weights = y * (1 - weight) + weight
    loss = (weights * entropy).mean()
    sigmoid = xp.where(scores >= 0, 1.0, small) / (1 + small)
    slope = weights * (sigmoid - y) / (y.shape[0] * y.shape[1])
    back = slope @ second
    if relu:
        back = back * (linear > 0)
    return loss, [back.T @ x, slope.T @ hidden, slope.sum(axis=0)]


def cutoff(scores: np.ndarray, target: float) -> float:
    """The largest score at or above which at least a share ``target`` of ``scores`` lies."""
    if not scores.size:
        return MAX_LOGIT
    missed = min(int((1 - target) * scores.size), scores.size - 1)
    return float(np.partition(scores, missed)[missed])


def weighted_cutoff(scores: np.ndarray, weights: np.ndarray, target: float) -> float:
    """``cutoff`` with each score counted by its weight."""
    order = np.argsort(scores)
    missed = np.cumsum(weights[order], dtype=np.float64)
    if not scores.size or missed[-1] <= 0:
        return MAX_LOGIT
    first = int(np.searchsorted(missed, (1 - target) * missed[-1], side="right"))
    return float(scores[order[min(first, scores.size - 1)]])


def sigmoid(logit: float) -> float:
    """A threshold between 0 and 1, both excluded, for a score."""
    return 1 / (1 + math.exp(-min(max(logit, -700.0), MAX_LOGIT)))

"""What random models that fire sparsely are made of: a novel's words, rates, predictors."""

from __future__ import annotations

import re
import statistics

import mlx.core as mx
import numpy as np

from mlx_flash.calibration.text import DEFAULT as NOVEL
from mlx_flash.predictors.predictor_file import LayerPredictor

MOST = 0.95  # of the tokens, for the busiest neuron


def novel() -> list[str]:
    """The words and marks of the novel that ships with the package, in lower case, in order."""
    return re.findall(r"\w+|[^\w\s]", NOVEL.read_text().lower())


def frequencies(random: np.random.Generator, rows: int, active: float, spread: float) -> np.ndarray:
    """How often each neuron is to fire, as a share of the tokens, float64 [rows].

    Args:
        active: average over the rows.
        spread: standard deviation of the rates' logarithm.
    """
    shape = np.exp(spread * random.standard_normal(rows))
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        less = np.minimum(MOST, middle * shape).mean() < active
        low, high = (middle, high) if less else (low, middle)
    return np.clip(low * shape, 1e-6, MOST)


def normal_quantiles(shares: np.ndarray) -> np.ndarray:
    """For each share the number that such a share of normal numbers is below, float32."""
    return np.vectorize(statistics.NormalDist().inv_cdf)(shares).astype(np.float32)


def low_rank(tensors: dict[str, mx.array], named: np.ndarray, margin: float) -> LayerPredictor:
    """A low-rank predictor of one layer.

    Args:
        tensors: "first", "second" and perhaps "bias".
        named: bool [tokens, rows], which rows it names for which token.
        margin: a row is named where its score, before the sigmoid, is as large.
    """
    mx.eval(tensors)
    demand = {}
    for count in (1, 2, 4, 8):
        spans = np.lib.stride_tricks.sliding_window_view(named, count, axis=0)
        demand[str(count)] = float(spans[::count].any(axis=-1).sum(axis=1).mean())
    threshold = float(1 / (1 + np.exp(-margin)))
    return LayerPredictor("low-rank", threshold, tensors=tensors, demand=demand)

"""How far two sets of logits lie apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# Of two logits' difference, each of which rounding moves: three standard deviations, 3 * sqrt(2).
SPREAD = 4.2


@dataclass(frozen=True)
class Distance:
    """Of some tokens' logits from a reference's.

    Args:
        tokens: how many were compared.
        max: largest difference of a logit.
        psnr: peak (the reference's largest logit in size) over root mean square error, dB.
        kl: mean Kullback-Leibler divergence of what is measured from the reference, nats.
        top1: share of tokens whose likeliest next token is the same.
        ties: tokens where it is another one that is as good: in the reference the two lie nearer
            together than float16 can tell apart at their size, or than the rounding moves them.
        rms: root mean square of the differences.
    """

    tokens: int
    max: float
    psnr: float
    kl: float
    top1: float
    ties: int
    rms: float

    @property
    def top1_apart(self) -> float:
        """The share of tokens whose likeliest next token is the same, or tied with it."""
        return self.top1 + self.ties / self.tokens if self.tokens else self.top1

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"top1_apart": self.top1_apart}


def distance(found: np.ndarray, reference: np.ndarray, rounding: float = 0.0) -> Distance:
    """Compare logits [tokens, vocabulary]; logits that are not finite are infinitely far.

    Args:
        rounding: root mean square error of a logit that is known to come of rounding alone. Two
            tokens within SPREAD times that are tied.
    """
    if found.shape != reference.shape:
        raise ValueError(f"logits {found.shape} against {reference.shape}")
    tokens = len(found)
    if not np.isfinite(found).all():
        return Distance(tokens, math.inf, -math.inf, math.inf, 0.0, 0, math.inf)
    a, b = found.astype(np.float64), reference.astype(np.float64)
    rms = math.sqrt(float(np.mean((a - b) ** 2)))
    peak = float(np.abs(b).max())
    psnr = math.inf if rms == 0 else 20 * math.log10(peak / rms) if peak else -math.inf
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    kl = float(np.mean(np.sum(np.exp(log_b) * (log_b - log_a), axis=-1)))
    same = a.argmax(-1) == b.argmax(-1)
    best = b.max(-1)
    chosen = np.take_along_axis(b, a.argmax(-1)[:, None], -1)[:, 0]
    apart = np.spacing(np.abs(best).astype(np.float16)).astype(np.float64)
    tied = ~same & (best - chosen <= np.maximum(apart, SPREAD * rounding))
    largest = float(np.abs(a - b).max())
    return Distance(tokens, largest, psnr, max(kl, 0.0), float(same.mean()), int(tied.sum()), rms)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

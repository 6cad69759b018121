"""How far two sets of logits lie apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Distance:
    """Of some tokens' logits from a reference's.

    Args:
        tokens: how many were compared.
        max: largest difference of a logit.
        psnr: peak (the reference's largest logit in size) over root mean square error, dB.
        kl: mean Kullback-Leibler divergence of what is measured from the reference, nats.
        top1: share of tokens whose likeliest next token is the same.
        top1_apart: the same, where two that lie nearer together in the reference than float16 can
            tell apart at their size count as one.
    """

    tokens: int
    max: float
    psnr: float
    kl: float
    top1: float
    top1_apart: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def distance(found: np.ndarray, reference: np.ndarray) -> Distance:
    """Compare logits [tokens, vocabulary]; logits that are not finite are infinitely far."""
    if found.shape != reference.shape:
        raise ValueError(f"logits {found.shape} against {reference.shape}")
    tokens = len(found)
    if not np.isfinite(found).all():
        return Distance(tokens, math.inf, -math.inf, math.inf, 0.0, 0.0)
    a, b = found.astype(np.float64), reference.astype(np.float64)
    rms = math.sqrt(float(np.mean((a - b) ** 2)))
    peak = float(np.abs(b).max())
    psnr = math.inf if rms == 0 else 20 * math.log10(peak / rms) if peak else -math.inf
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    kl = float(np.mean(np.sum(np.exp(log_b) * (log_b - log_a), axis=-1)))
    same = a.argmax(-1) == b.argmax(-1)
    best = b.max(-1)
    chosen = np.take_along_axis(b, a.argmax(-1)[:, None], -1)[:, 0]
    tied = best - chosen <= np.spacing(np.abs(best).astype(np.float16)).astype(np.float64)
    largest = float(np.abs(a - b).max())
    return Distance(tokens, largest, psnr, max(kl, 0.0), float(same.mean()), float(tied.mean()))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

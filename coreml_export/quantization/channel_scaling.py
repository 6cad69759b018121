"""Scales between what gives a channel and what takes it, so that the takers quantise well.

A norm's weight, up's rows and v's rows each give channels that are linear in them; the matrices
that take these channels may have their columns multiplied by anything that the giver is divided by
(SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978). The model computes the same, at no cost. A
row of int8, or of blocks of int4, does not notice what it is divided by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from coreml_export.source.decoder_spec import Attention, Decoder, Ffn, Linear, Norm

from .formats import BLOCK

RANGE = 16.0  # that scales lie within, and its inverse
STEPS = 20
# The largest number of a group sets its step; a mean of this power stands for it.
POWERS = {"int8": 24.0, "int4": 4.0}


@dataclass(frozen=True)
class Fold:
    """One set of channels.

    Args:
        giver: a norm's weight, or a matrix that gives them by its rows.
        takers: matrices that take them by their columns, all called with the same input.
        shared: (n, size): takers see each group of ``size`` channels n times.
        norm: the giver is a norm's weight.
    """

    giver: str
    takers: tuple[str, ...]
    shared: tuple[int, int] = (1, 1)
    norm: bool = False


@dataclass
class Scales:
    """Scales of a whole model, by a matrix' name: divisors of rows, factors of columns."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    _norms: list[str] = field(default_factory=list)

    def put(self, fold: Fold, s: np.ndarray) -> None:
        """Take the scales of a fold, one for each of its takers' columns."""
        repeats, size = fold.shared
        self.rows[fold.giver] = s.reshape(-1, repeats, size)[:, 0].reshape(-1)
        for name in fold.takers:
            self.columns[name] = s
        if fold.norm:
            self._norms.append(fold.giver)

    def norms(self) -> list[tuple[str, np.ndarray]]:
        """(norm's weight, what it is divided by)."""
        return [(name, self.rows[name]) for name in self._norms]

    def of(self, name: str, array: np.ndarray) -> np.ndarray:
        """A tensor of the scaled model."""
        if name in self.columns:
            array = array * self.columns[name]
        if name in self.rows:
            divisor = self.rows[name]
            array = array / (divisor[:, None] if array.ndim == 2 else divisor)
        return array


def folds(
    decoder: Decoder, matrices: Collection[str], ffn_norm_has_other_readers: bool
) -> list[Fold]:
    """Every set of channels of a decoder that may be scaled.

    Args:
        matrices: names of those that are quantised; no other is touched.
        ffn_norm_has_other_readers: more than the FFN takes what its norm gives, such as a trained
            predictor.
    """
    found = []
    for layer in decoder.layers:
        attention, ffn = layer.attention, layer.ffn
        pre = layer.order == "pre"
        if pre and _bare(layer.attention_norm):
            found.append(_fold(layer.attention_norm.weight.name, attention))
        if _plain(attention.v):
            repeats = decoder.heads // decoder.kv_heads
            shared = (repeats, decoder.head_dim) if repeats > 1 else (1, 1)
            found.append(Fold(attention.v.weight.name, (attention.out.weight.name,), shared))
        if pre and _bare(layer.ffn_norm) and not ffn_norm_has_other_readers:
            found.append(_fold(layer.ffn_norm.weight.name, ffn))
        if ffn.gate and _plain(ffn.up):
            found.append(Fold(ffn.up.weight.name, (ffn.down.weight.name,)))
    return [f for f in found if set(f.takers) <= set(matrices) and (f.norm or f.giver in matrices)]


def _bare(norm: Norm | None) -> bool:
    return norm is not None and norm.weight is not None and norm.bias is None


def _plain(linear: Linear) -> bool:
    return linear.bias is None and linear.weight.rows is None


def _fold(giver: str, taker: Attention | Ffn) -> Fold:
    if isinstance(taker, Ffn):
        linears = [linear for linear in (taker.gate, taker.up) if linear]
    else:
        linears = [taker.q, taker.k, taker.v]
    names = dict.fromkeys(linear.weight.name for linear in linears)  # some share one tensor
    return Fold(giver, tuple(names), norm=True)


class Finder:
    """Finds scales while a model runs: give it each matrix with what comes in.

    Args:
        wanted: folds.
        schemes: int4 or int8, by a matrix' name.
    """

    def __init__(self, wanted: Sequence[Fold], schemes: dict[str, str]) -> None:
        self.scales = Scales()
        self.wanted = bool(wanted)
        self._folds = {name: fold for fold in wanted for name in fold.takers}
        self._schemes = schemes
        self._held: dict[str, np.ndarray] = {}

    def see(self, name: str, array: np.ndarray, given: np.ndarray) -> None:
        """A matrix [out, in] and its inputs [tokens, in]; it is held until its fold is whole."""
        fold = self._folds.get(name)
        if fold is None:
            return
        self._held[name] = array
        if not set(fold.takers) <= set(self._held):
            return
        arrays = [self._held.pop(taker) for taker in fold.takers]
        kinds = {self._schemes[taker] for taker in fold.takers}
        scheme = "int4" if "int4" in kinds else "int8"
        squares = np.square(given).mean(axis=0)
        self.scales.put(fold, scales(np.concatenate(arrays), squares, scheme, fold.shared))


def scales(
    array: np.ndarray, squares: np.ndarray, scheme: str, shared: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """What columns [out, in] are best multiplied by before they are rounded.

    Args:
        squares: means of the inputs' squares.

    With s, a number of row r is off by about max_i |w_ri s_i|, over its block, and adds that times
    sqrt(squares_i) / s_i to the product. The sum of squares is made least, the largest being
    replaced by a mean of a high power: each s then follows from the others. None at all (1) is
    kept where it is better.
    """
    power = POWERS[scheme]
    width = array.shape[1]
    block = BLOCK if scheme == "int4" and width % BLOCK == 0 else width
    sizes = np.abs(array).astype(np.float64)
    sizes /= max(sizes.max(), 1e-30)
    powers = sizes**power + 1e-60
    squares = squares / max(squares.max(), 1e-30) + 1e-12
    tie = _tie(shared)
    s = np.ones(width)
    for _ in range(STEPS):
        sums = (powers * s**power).reshape(len(array), -1, block).sum(axis=2)
        steps = sums ** (2 / power)
        noise = (squares / s**2).reshape(-1, block).sum(axis=1)
        parts = powers.reshape(len(array), -1, block)
        below = np.einsum("rb,rbi->bi", steps / sums * noise, parts).reshape(-1)
        above = (squares.reshape(-1, block) * steps.sum(axis=0)[:, None]).reshape(-1)
        s = np.sqrt(s * (tie(above) / tie(below)) ** (1 / (power + 2)))
        s /= np.exp(np.log(s).mean())
    s = np.clip(s, 1 / RANGE, RANGE)
    better = expected(sizes, squares, s, block) < expected(sizes, squares, np.ones(width), block)
    return (s if better else np.ones(width)).astype(np.float32)


def expected(sizes: np.ndarray, squares: np.ndarray, s: np.ndarray, block: int) -> float:
    """Square error of the product after rounding, up to a constant factor."""
    largest = (sizes * s).reshape(len(sizes), -1, block).max(axis=2)
    noise = (squares / s**2).reshape(-1, block).sum(axis=1)
    return float((largest**2 @ noise).sum())


def _tie(shared: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Adds up what channels that share a scale have, for each of them."""
    repeats, size = shared

    def tie(x: np.ndarray) -> np.ndarray:
        whole = x.reshape(-1, repeats, size).sum(axis=1, keepdims=True)
        return np.repeat(whole, repeats, axis=1).reshape(-1)

    return tie if repeats > 1 else lambda x: x

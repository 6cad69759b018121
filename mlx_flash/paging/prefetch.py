"""Reading ahead what the next layer will probably need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_flash.predictors.predictor import Predictor

if TYPE_CHECKING:
    from .row_stream import RowStream
    from .slots.row_cache import RowCache


def best(scores: mx.array, top_k: int) -> mx.array:
    """Numbers of the experts with the highest scores, [..., top_k]."""
    return mx.argpartition(-scores, kth=top_k - 1, axis=-1)[..., :top_k]


@dataclass
class Lookahead:
    """A guess at the experts of the next layer, from what this layer's experts are given.

    The next layer's router, put to this layer's input: what attention and the experts add in
    between moves it a little only. A wrong guess costs bytes, nothing else.

    Args:
        scores: hidden state -> the next layer's scores of experts, see ``mixtures.router_of``.
        cache: the next layer's slots.
        top_k: experts per token.
    """

    scores: Callable[[mx.array], mx.array]
    cache: RowCache
    top_k: int

    def guess(self, x: mx.array) -> mx.array:
        """Expert numbers, [..., top_k]."""
        return best(self.scores(x), self.top_k)


TRIAL = 16  # tokens after which it shows whether foretelling pays
LEAST_RIGHT = 0.7  # of the foretold rows


@dataclass
class Guesses:
    """How well a layer's rows were foretold, in tokens and rows, whatever was in slots."""

    tokens: int = 0
    named: int = 0
    right: int = 0

    def count(self, named: int, right: int) -> None:
        """Add a token's."""
        self.tokens += 1
        self.named += named
        self.right += right

    @property
    def pay(self) -> bool:
        """Whether to go on: not where, once that is known, too many were wrong.

        A wrong one is read and added up for nothing.
        """
        return self.tokens < TRIAL or self.right >= LEAST_RIGHT * self.named


class Foresight:
    """Begins to bring what the next layer may need, by what this one is given.

    Deja Vu's asynchronous predictor (arXiv 2310.17157, section 4.3): the next layer's predictor,
    put to this layer's input, computed beside this layer's FFN. What attention and the FFN add in
    between moves the input a little only. A wrong guess costs bytes and a row's sum.

    Args:
        predictor: the next layer's.
        cache: its slots.
        stream: that brings its rows.
    """

    def __init__(self, predictor: Predictor, cache: RowCache, stream: RowStream) -> None:
        self._predictor, self._cache, self._stream = predictor, cache, stream
        self._beside = mx.new_thread_local_stream(mx.default_device())

    def __call__(self, hidden: mx.array) -> None:
        """Foretell by ``hidden`` [..., d_model], which is there already."""
        if not self._stream.foretells(self._cache.layer):
            return
        with mx.stream(self._beside):
            rows = self._predictor(hidden).rows
        self._stream.foretell(self._cache.layer, rows, self._cache)

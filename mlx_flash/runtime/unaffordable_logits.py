"""Logits of a long prompt that a budget has no room for.

mlx-lm runs a prompt through the model for its cache and drops the logits, which then are never
computed. Somebody who wants those of every token is refused, instead of going beyond the budget.
"""

from __future__ import annotations

from typing import Any, NoReturn

import mlx.core as mx

from mlx_flash.common.sizes import show
from mlx_flash.errors import BudgetError


class UnaffordableLogits:
    """Stands for logits [batch, tokens, vocabulary] that must not be computed all at once.

    Those of the last token can be had: ``logits[:, -1]`` or ``logits[:, -1:]``. Anything else
    raises BudgetError.

    Args:
        chunks: of the prompt, in order, not computed.
        ram: the budget in bytes.
    """

    def __init__(self, chunks: list[mx.array], ram: int) -> None:
        self._last = chunks[-1]
        batch, _, vocabulary = self._last.shape
        self.shape = (batch, sum(chunk.shape[1] for chunk in chunks), vocabulary)
        self.nbytes = sum(chunk.nbytes for chunk in chunks)
        self._ram = ram

    def __getitem__(self, key: Any) -> mx.array:
        place = key[1] if isinstance(key, tuple) and len(key) > 1 else None
        if isinstance(place, int) and place == -1:
            return self._last[key]
        if isinstance(place, slice) and (place.start, place.stop, place.step) == (-1, None, None):
            return self._last[key]
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def __iter__(self) -> NoReturn:
        self._refuse()

    def __len__(self) -> int:
        return self.shape[0]

    def _refuse(self) -> NoReturn:
        raise BudgetError(
            f"logits of {self.shape[1]} tokens take {show(2 * self.nbytes)} while they are joined, "
            f"which the budget of {show(self._ram)} has no room for; ask for fewer tokens in a "
            "call, for the last one alone (logits[:, -1]), or load with a larger budget"
        )

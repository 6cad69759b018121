"""Embeddings that refuse numbers beyond their rows.

MLX does not check an index: a token or a position past a table's end is read from foreign memory.
Numbers are looked at before the lookup is built, so the memory is never touched.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import ModelError

POSITION_TABLES = ("wpe", "embed_positions")


def check_tokens(tokens: np.ndarray, rows: int) -> None:
    """Raise ModelError unless an embedding of so many rows has all of some token numbers."""
    if tokens.size and not (-rows <= tokens.min() and tokens.max() < rows):
        worst = tokens.max() if tokens.max() >= rows else tokens.min()
        raise ModelError(
            f"token {worst} is outside the model's embedding, which has {rows} tokens; use the "
            "tokenizer of the model directory, and no token that was added to it later"
        )


def bound_embeddings(model: nn.Module) -> None:
    """Let every embedding of a model, once its weights are loaded, refuse what it has no row for.

    Tables of learned positions, too. Looking at the numbers evaluates them.
    """
    for path, module in model.named_modules():
        kind = BOUNDED.get(type(module))
        if kind:
            module._holds_positions = path.rpartition(".")[2] in POSITION_TABLES
            module.__class__ = kind


class _Bounded(nn.Module):
    _holds_positions: bool

    def __call__(self, indices: mx.array) -> mx.array:
        """Rows of numbers [...], as [..., width].

        Raises:
            ModelError: there is no such token or position.
        """
        found, rows = np.array(indices), self.weight.shape[0]
        if not self._holds_positions:
            check_tokens(found, rows)
        elif found.size and not (found.min() >= 0 and found.max() < rows):
            raise ModelError(
                f"{found.max() + 1} tokens are more than the {rows} that this model has positions "
                "for; use a shorter prompt or generate fewer tokens"
            )
        called: Any = super().__call__
        return called(indices)


class BoundedEmbedding(_Bounded, nn.Embedding):
    """mlx-lm's embedding of floats."""


class BoundedQuantizedEmbedding(_Bounded, nn.QuantizedEmbedding):
    """mlx-lm's quantised embedding."""


BOUNDED = {nn.Embedding: BoundedEmbedding, nn.QuantizedEmbedding: BoundedQuantizedEmbedding}

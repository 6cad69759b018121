"""What a decoder is made of: one description for every architecture that can be exported.

``families`` makes it; programs, quantisation and verification work on this description alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from coreml_export.errors import ExportError

MULTIPLE = 32  # that sizes of states and tables are rounded up to
LEAST_CONTEXT = 64
SLICES = 8  # of the head, whose sums are added up in float32


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named tensor, or a selection of its rows (in any order) or of a range of its columns.

    ``part`` tells selections of one tensor apart.
    """

    name: str
    rows: np.ndarray | None = None
    columns: tuple[int, int] | None = None
    part: str = ""

    def of(self, array: np.ndarray) -> np.ndarray:
        """The selected part of the whole tensor."""
        chosen = array if self.rows is None else array[self.rows]
        return chosen[:, slice(*self.columns)] if self.columns else chosen

    @property
    def key(self) -> str:
        return f"{self.name}:{self.part}" if self.part else self.name


@dataclass(frozen=True)
class Linear:
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """Root mean square or layer norm; without a weight it only normalises."""

    kind: str  # "rms" or "layer"
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Attention:
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Ffn:
    """``down(act(gate(x)) * up_act(up(x)))``, or ``down(act(up(x)))`` without a gate."""

    up: Linear
    down: Linear
    gate: Linear | None
    activation: str
    threshold: float = 0.0
    up_activation: str | None = None


@dataclass(frozen=True)
class Layer:
    """A decoder layer; ``order`` says how its halves are put together.

    pre: ``x += attn(n1(x)); x += ffn(n2(x))``. post: ``x = n1(x + attn(x)); x = n2(x + ffn(x))``.
    parallel: ``x + attn(n1(x)) + ffn(n2(x))``, where without n2 the FFN takes ``n1(x)``, too.
    """

    order: str
    attention: Attention
    ffn: Ffn
    attention_norm: Norm
    ffn_norm: Norm | None


@dataclass(frozen=True)
class Decoder:
    """A decoder: sizes, layers, and how positions enter."""

    model_type: str
    d_model: int
    d_ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: list[Layer]
    embedding: Tensor
    head: Linear
    final_norm: Norm | None
    rope: Any = None  # mlx-lm's module, the same for all layers
    rope_dims: int = 0
    rope_traditional: bool = False
    positions: Tensor | None = None  # learned ones
    first_position: int = 0
    project_in: Linear | None = None
    project_out: Linear | None = None
    slopes: np.ndarray | None = None  # ALiBi's, one for each head
    limit: int | None = None  # tokens beyond which the model has no positions
    scale: float = 1.0
    narrow: int = 0  # width of the embedding where something projects it

    @property
    def d_embedding(self) -> int:
        """Width of the token embedding; narrower than d_model where something projects it."""
        return self.narrow or self.d_model


def column_slices(tensor: Tensor, width: int) -> list[Tensor]:
    """A matrix cut along its input into SLICES pieces of whole blocks of 32, or fewer."""
    blocks = -(-width // MULTIPLE)
    count = min(SLICES, blocks)
    edges = [min(width, blocks * i // count * MULTIPLE) for i in range(count)] + [width]
    return [
        Tensor(tensor.name, tensor.rows, (a, b), f"columns{a}")
        for a, b in itertools.pairwise(edges)
    ]


def embedding_pieces(decoder: Decoder, fp32_residual: bool) -> list[Tensor]:
    """The pieces in which the embedding is stored: the head's slices where both are one tensor."""
    if fp32_residual and decoder.head.weight.name == decoder.embedding.name:
        return column_slices(decoder.embedding, decoder.d_embedding)
    return [decoder.embedding]


def check_length(context: int) -> None:
    """Raise ExportError unless Core ML's states can hold a context of this many tokens."""
    if context < LEAST_CONTEXT or context % MULTIPLE:
        raise ExportError(
            f"a context of {context} tokens; expected a multiple of {MULTIPLE}, at least "
            f"{LEAST_CONTEXT} (Core ML's states fail otherwise)"
        )


def check_context(decoder: Decoder, context: int) -> None:
    """Raise ExportError unless a decoder can run a context of this many tokens."""
    check_length(context)
    if decoder.limit is not None and context > decoder.limit:
        raise ExportError(
            f"a context of {context} tokens, but this {decoder.model_type} model has positions or "
            f"a window for {decoder.limit} only; choose a --context up to that"
        )


def tensors(value: Any) -> Iterator[tuple[Tensor, bool]]:
    """(tensor, whether it is a matrix of a linear layer or the embedding) in a description."""
    if isinstance(value, Tensor):
        yield value, False
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value):
        for f in fields(value):
            item = getattr(value, f.name)
            if isinstance(item, Tensor):
                yield item, f.name == "embedding" or type(value).__name__ == "Linear"
            else:
                yield from tensors(item)

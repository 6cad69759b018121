"""The parts of a decoder in MIL, each the mirror of an MLX module.

Matrices, attention and activations compute in fp16. With ``fp32_residual``, norms and residual sums
are float32, and the head's product is added up from slices in float32: real models' logits are so
large that fp16 cannot tell near ones apart. Without it all of that is fp16, and a norm divides by
the largest number first, since squares of fp16 overflow from 256 on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from coreml_export.source import rotary_tables
from coreml_export.source.decoder_spec import (
    Attention,
    Decoder,
    Ffn,
    Layer,
    Linear,
    Norm,
    column_slices,
    embedding_pieces,
)

from .coremltools_compat import mb, types
from .weights import Weights

MASKED = -1e4  # added to the score of a key that a query may not see; fp16 holds it
SMALLEST = np.float16(2**-10)  # what a norm divides by at least


@dataclass
class Builder:
    """The parts of one function.

    Args:
        decoder: the model.
        weights: of the package that the function belongs to.
        length: tokens that it takes at once.
        context: positions that its state holds.
        fp32_residual: see above.
    """

    decoder: Decoder
    weights: Weights
    length: int
    context: int
    fp32_residual: bool = True

    def to_residual(self, x: Any) -> Any:
        """A part's result in the type of the residual stream."""
        return mb.cast(x=x, dtype="fp32") if self.fp32_residual else x

    def linear(self, x: Any, linear: Linear, bias: bool = True) -> Any:
        """``nn.Linear``."""
        weight = self.weights.matrix(linear.weight)
        if linear.bias is None or not bias:
            return mb.linear(x=x, weight=weight, bias=self.weights.zeros(weight.shape[0]))
        return mb.linear(x=x, weight=weight, bias=self.weights.vector(linear.bias))

    def norm(self, x: Any, norm: Norm) -> Any:
        """``nn.RMSNorm`` or ``nn.LayerNorm`` over the last axis; gives fp16."""
        if self.fp32_residual:
            return self._fp32_norm(x, norm)
        size = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
        size = mb.maximum(x=size, y=SMALLEST)
        y = mb.real_div(x=x, y=size)
        if norm.kind == "layer":
            y = mb.sub(x=y, y=mb.reduce_mean(x=y, axes=[-1], keep_dims=True))
        square = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[-1], keep_dims=True)
        eps = mb.real_div(x=np.float16(math.sqrt(norm.eps)), y=size)
        square = mb.add(x=square, y=mb.mul(x=eps, y=eps))
        y = mb.mul(x=y, y=mb.rsqrt(x=square, epsilon=np.float16(6e-8)))
        if norm.weight:
            y = mb.mul(x=y, y=self.weights.vector(norm.weight))
        if norm.bias:
            y = mb.add(x=y, y=self.weights.vector(norm.bias))
        return y

    def _fp32_norm(self, x: Any, norm: Norm) -> Any:
        y = x if x.dtype == types.fp32 else mb.cast(x=x, dtype="fp32")
        if norm.kind == "layer":
            y = mb.sub(x=y, y=mb.reduce_mean(x=y, axes=[-1], keep_dims=True))
        square = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[-1], keep_dims=True)
        y = mb.mul(x=y, y=mb.rsqrt(x=square, epsilon=np.float32(norm.eps)))
        if norm.weight:
            y = mb.mul(x=y, y=self.to_residual(self.weights.vector(norm.weight)))
        if norm.bias:
            y = mb.add(x=y, y=self.to_residual(self.weights.vector(norm.bias)))
        return mb.cast(x=y, dtype="fp16")

    def indices(self, position: Any) -> Any:
        """Positions of the function's tokens, [length]."""
        if self.length == 1:
            return position
        return mb.add(x=position, y=np.arange(self.length, dtype=np.int32))

    def embed(self, ids: Any) -> Any:
        """Token numbers [1, length] -> [1, length, width]."""
        pieces = embedding_pieces(self.decoder, self.fp32_residual)
        rows = [mb.gather(x=self.weights.matrix(p), indices=ids, axis=0) for p in pieces]
        return rows[0] if len(rows) == 1 else mb.concat(values=rows, axis=-1)

    def enter(self, x: Any, indices: Any) -> Any:
        """Projection and learned positions, between the embedding and the first layer."""
        decoder = self.decoder
        if decoder.project_in:
            x = self.linear(x, decoder.project_in)
        x = self.to_residual(x)
        if decoder.positions:
            first = decoder.first_position

            def rows() -> np.ndarray:
                table = self.weights.packed(decoder.positions).floats()
                return table[first : first + self.context]

            table = self.weights.table(f"{decoder.positions.name}/context", rows)
            x = mb.add(x=x, y=self.to_residual(mb.gather(x=table, indices=indices, axis=0)))
        return x

    def head(self, x: Any) -> Any:
        """The last layer's output -> logits."""
        if self.decoder.final_norm:
            x = self.norm(x, self.decoder.final_norm)
        elif self.fp32_residual:
            x = mb.cast(x=x, dtype="fp16")
        if self.decoder.project_out:
            x = self.linear(x, self.decoder.project_out)
        return self._fp32_head(x) if self.fp32_residual else self.linear(x, self.decoder.head)

    def _fp32_head(self, x: Any) -> Any:
        head = self.decoder.head
        pieces = column_slices(head.weight, x.shape[-1])
        sizes = [p.columns[1] - p.columns[0] for p in pieces]
        inputs = mb.split(x=x, split_sizes=sizes, axis=-1) if len(pieces) > 1 else [x]
        total = None
        for piece, part in zip(pieces, inputs, strict=True):
            zeros = self.weights.zeros(self.decoder.vocab)
            y = mb.linear(x=part, weight=self.weights.matrix(piece), bias=zeros)
            y = self.to_residual(y)
            total = y if total is None else mb.add(x=total, y=y)
        if head.bias:
            total = mb.add(x=total, y=self.to_residual(self.weights.vector(head.bias)))
        return total

    def rope(self, indices: Any) -> tuple[Any, Any] | None:
        """Cosines and sines of the function's positions, [length, 1, half]."""
        if self.decoder.rope is None:  # a module without parameters is false
            return None
        found = []
        for i, name in enumerate(("cos", "sin")):
            table = self.weights.table(
                f"rope/{name}", lambda i=i: rotary_tables.tables(self.decoder, self.context)[i]
            )
            rows = mb.gather(x=table, indices=indices, axis=0)
            found.append(mb.reshape(x=rows, shape=[self.length, 1, -1]))
        return found[0], found[1]

    def rotate(self, x: Any, tables: tuple[Any, Any] | None) -> Any:
        """``nn.RoPE`` of x [length, heads, head_dim]."""
        if tables is None:
            return x
        cos, sin = tables
        dims, whole = self.decoder.rope_dims, x.shape[-1]
        half = dims // 2
        sizes = [half, half] if dims == whole else [half, half, whole - dims]
        first, second, *rest = mb.split(x=x, split_sizes=sizes, axis=-1)
        turned = [
            mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
            mb.add(x=mb.mul(x=first, y=sin), y=mb.mul(x=second, y=cos)),
        ]
        return mb.concat(values=[*turned, *rest], axis=-1)

    def alibi(self, indices: Any) -> Any | None:
        """ALiBi's bias [kv_heads, repeats, length, context], zero at each query's own position.

        The model's bias is rounded to bfloat16 and grows from the first token on; softmax does not
        see what is subtracted from all of a row, and small numbers are what fp16 is good at.
        """
        decoder = self.decoder
        if decoder.slopes is None:
            return None
        groups, repeats = decoder.kv_heads, decoder.heads // decoder.kv_heads

        def bias() -> np.ndarray:
            at = _bfloat16(np.arange(self.context, dtype=np.float32))
            whole = _bfloat16(decoder.slopes[:, None] * at) * np.float32(decoder.scale)
            return whole.reshape(groups, repeats, 1, self.context)

        table = self.weights.table("alibi", bias)
        own = mb.gather(x=table, indices=indices, axis=3)
        own = mb.transpose(x=own, perm=[0, 1, 3, 2])
        return mb.sub(x=table, y=own)

    def attention(self, x: Any, part: Attention, cache: Any, index: int) -> Any:
        """Self attention over the states; ``cache`` holds them and moves on."""
        decoder, length = self.decoder, self.length
        heads, groups, dim = decoder.heads, decoder.kv_heads, decoder.head_dim
        repeats, width = heads // groups, groups * dim

        def project(linear: Linear, n: int, norm: Norm | None = None) -> Any:
            y = mb.reshape(x=self.linear(x, linear), shape=[length, n, dim])
            return self.norm(y, norm) if norm else y

        q = self.rotate(project(part.q, heads, part.q_norm), cache.rope)
        k = self.rotate(project(part.k, groups, part.k_norm), cache.rope)
        v = project(part.v, groups)
        q = mb.mul(x=q, y=np.float16(decoder.scale))
        q = mb.reshape(x=mb.transpose(x=q, perm=[1, 0, 2]), shape=[groups, repeats * length, dim])
        flat = [mb.reshape(x=a, shape=[length, width]) for a in (k, v)]
        keys, values = cache.update(index, *flat)

        def by_head(rows: Any) -> Any:
            rows = mb.reshape(x=rows, shape=[self.context, groups, dim])
            return mb.transpose(x=rows, perm=[1, 0, 2])

        scores = mb.matmul(x=q, y=by_head(keys), transpose_y=True)
        scores = mb.reshape(x=scores, shape=[groups, repeats, length, self.context])
        if cache.alibi is not None:
            scores = mb.add(x=scores, y=cache.alibi)
        shares = mb.softmax(x=mb.add(x=scores, y=cache.mask), axis=-1)
        shares = mb.reshape(x=shares, shape=[groups, repeats * length, self.context])
        y = mb.matmul(x=shares, y=by_head(values))
        y = mb.transpose(x=mb.reshape(x=y, shape=[heads, length, dim]), perm=[1, 0, 2])
        return self.linear(mb.reshape(x=y, shape=[1, length, heads * dim]), part.out)

    def ffn(self, x: Any, part: Ffn) -> Any:
        """The FFN of one layer."""
        value = self.linear(x, part.gate or part.up)
        other = self.linear(x, part.up) if part.gate else None
        hidden, factor = activate(value, other, part, self.fp32_residual)
        y = self.linear(hidden, part.down, bias=factor is None)
        if factor is not None:
            y = mb.mul(x=y, y=factor)
            if part.down.bias:
                y = mb.add(x=y, y=self.weights.vector(part.down.bias))
        return y

    def layer(self, x: Any, part: Layer, cache: Any, index: int) -> Any:
        """A decoder layer; x is the residual stream."""
        x, normed = self.attend(x, part, cache, index)
        return self.leave(mb.add(x=x, y=self.to_residual(self.ffn(normed, part.ffn))), part)

    def attend(self, x: Any, part: Layer, cache: Any, index: int) -> tuple[Any, Any]:
        """A layer's first half: (residual stream, what the FFN takes)."""
        if part.order == "post":
            given = mb.cast(x=x, dtype="fp16") if self.fp32_residual else x
            y = self.attention(given, part.attention, cache, index)
            normed = self.norm(mb.add(x=x, y=self.to_residual(y)), part.attention_norm)
            return self.to_residual(normed), normed
        normed = self.norm(x, part.attention_norm)
        attended = self.to_residual(self.attention(normed, part.attention, cache, index))
        if part.order == "parallel":
            if part.ffn_norm:
                normed = self.norm(x, part.ffn_norm)
            return mb.add(x=x, y=attended), normed
        x = mb.add(x=x, y=attended)
        return x, self.norm(x, part.ffn_norm)

    def leave(self, x: Any, part: Layer) -> Any:
        """The norm after the FFN, in layers that have one there."""
        return self.to_residual(self.norm(x, part.ffn_norm)) if part.order == "post" else x


def activate(
    value: Any, other: Any | None, part: Ffn, fp32_residual: bool = False
) -> tuple[Any, Any | None]:
    """The activation of an FFN.

    Args:
        value: output of the gate, or of up where there is no gate.
        other: output of up beside a gate.
        fp32_residual: a smooth activation and its product are rounded once, not twice.

    Returns:
        (what down is applied to, factor for down's output or None).
    """
    factor = None
    if fp32_residual and other is not None and part.activation in ("silu", "gelu", "gelu_approx"):
        value, other = (mb.cast(x=x, dtype="fp32") for x in (value, other))
        hidden, _ = activate(value, other, part)
        return mb.cast(x=hidden, dtype="fp16"), None
    if part.activation == "relu2":
        positive = mb.relu(x=value)
        size = mb.reduce_max(x=positive, axes=[-1], keep_dims=True)
        factor = mb.maximum(x=size, y=SMALLEST)
        hidden = mb.mul(x=positive, y=mb.real_div(x=positive, y=factor))
    elif part.activation == "fatrelu":
        passes = mb.greater(x=value, y=np.float16(part.threshold))
        hidden = mb.select(cond=passes, a=value, b=np.float16(0))
    elif part.activation in ("gelu", "gelu_approx"):
        mode = "EXACT" if part.activation == "gelu" else "TANH_APPROXIMATION"
        hidden = mb.gelu(x=value, mode=mode)
    else:
        hidden = {"relu": mb.relu, "silu": mb.silu}[part.activation](x=value)
    if other is None:
        return hidden, factor
    if part.up_activation == "relu":
        other = mb.relu(x=other)
    return mb.mul(x=hidden, y=other), factor


@dataclass
class Cache:
    """Keys and values in two states, each [layers * context, width]; rows of a layer together.

    Each state is read once, and every update goes on from the one before: reading it again would
    let coremltools merge the reads and lose the writes between them.
    """

    position: Any
    mask: Any
    rope: tuple[Any, Any] | None
    alibi: Any | None
    length: int
    context: int
    width: int
    states: list[Any]

    def __post_init__(self) -> None:
        self._held = [mb.read_state(input=state) for state in self.states]
        self._at = mb.concat(values=[self.position, np.zeros(1, np.int32)], axis=0)

    def update(self, layer: int, keys: Any, values: Any) -> list[Any]:
        """Write a layer's new rows [length, width]; returns all its rows [context, width]."""
        first = layer * self.context
        begin = mb.add(x=self._at, y=np.array([first, 0], np.int32))
        end = mb.add(x=self._at, y=np.array([first + self.length, self.width], np.int32))
        found = []
        for i, rows in enumerate((keys, values)):
            whole = mb.slice_update(x=self._held[i], update=rows, begin=begin, end=end)
            self._held[i] = mb.coreml_update_state(state=self.states[i], value=whole)
            found.append(
                mb.slice_by_index(
                    x=self._held[i], begin=[first, 0], end=[first + self.context, self.width]
                )
            )
        return found


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """Float32 rounded to bfloat16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)

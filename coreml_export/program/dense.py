"""The dense decoder as functions ``decode`` (one token) and ``prefill`` (64), in packages.

One package holds a model below 1 GB. A larger model is cut: with a head of its own, the first
part begins with the token numbers and the last ends with the logits; with a tied head a first
package "ends" holds the embedding table once and four functions, embedding and head for each
length. The chain of a function names what is called after what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coreml_export.source.decoder_spec import MULTIPLE, Decoder

from .coremltools_compat import TARGETS, mb, mil, types
from .layers import Builder, Cache
from .weights import Weights

LENGTHS = {"decode": 1, "prefill": 64}


@dataclass(frozen=True)
class Part:
    """One package: which layers it holds, and whether embedding and head are in it."""

    name: str
    layers: tuple[int, ...]
    embeds: bool
    heads: bool


@dataclass
class Plan:
    """The packages of a dense decoder and the order of calls."""

    parts: list[Part]
    chains: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def state_width(decoder: Decoder) -> int:
    """Numbers in a row of a state."""
    return -(-decoder.kv_heads * decoder.head_dim // MULTIPLE) * MULTIPLE


def plan(decoder: Decoder, layer_bytes: Sequence[int], ends: tuple[int, int], limit: int) -> Plan:
    """Cut a decoder into packages.

    Args:
        layer_bytes: what each layer takes.
        ends: what embedding and head take; with a tied head the second is 0.
        limit: bytes that no package goes above.
    """
    embedding, head = ends
    count = len(layer_bytes)
    if sum(layer_bytes) + embedding + head <= limit:
        whole = Part("decoder", tuple(range(count)), True, True)
        return Plan([whole], {name: [("decoder", name)] for name in LENGTHS})
    tied = head == 0
    groups: list[list[int]] = [[]]
    size = 0 if tied else embedding
    for i, nbytes in enumerate(layer_bytes):
        if size + nbytes > limit and (groups[-1] or size):
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += nbytes
    if not tied and size + head > limit:
        groups.append([])
    parts = []
    if tied:
        parts.append(Part("decoder-ends", (), True, True))
    for n, group in enumerate(groups):
        first, last = n == 0 and not tied, n == len(groups) - 1 and not tied
        parts.append(Part(f"decoder-{n + 1}", tuple(group), first, last))
    result = Plan(parts)
    for name in LENGTHS:
        calls = [(part.name, name) for part in parts if part.layers or not tied]
        if tied:
            calls = [
                ("decoder-ends", f"embed_{name}"),
                *calls,
                ("decoder-ends", f"head_{name}"),
            ]
        result.chains[name] = calls
    return result


def functions(
    decoder: Decoder, weights: Weights, part: Part, context: int, fp32_residual: bool = True
) -> dict[str, Any]:
    """MIL functions of one package by name; see ``layers`` for ``fp32_residual``."""
    made: dict[str, Any] = {}
    for name, length in LENGTHS.items():
        builder = Builder(decoder, weights, length, context, fp32_residual)
        if part.layers:
            made[name] = _layers(builder, part)
        elif part.embeds:
            made[f"embed_{name}"] = _function(_embed(builder), [_ids(length)])
            made[f"head_{name}"] = _function(_head(builder), [_hidden(builder, decoder.d_model)])
        else:
            made[name] = _function(_head(builder), [_hidden(builder, decoder.d_model)])
    return made


def _function(body: Callable[..., Any], specs: list[Any]) -> Any:
    return mb._create_function(body, specs, TARGETS["iOS18"])


def _ids(length: int) -> Any:
    return mb.TensorSpec(shape=(1, length), dtype=types.int32)


def _hidden(builder: Builder, width: int, fp32: bool | None = None) -> Any:
    """The spec of a hidden state, in the residual stream's type unless ``fp32`` says otherwise."""
    fp32 = builder.fp32_residual if fp32 is None else fp32
    shape = (1, builder.length, width)
    return mb.TensorSpec(shape=shape, dtype=types.fp32 if fp32 else types.fp16)


def state(rows: int, decoder: Decoder) -> Any:
    """The spec of one state."""
    return mb.StateTensorSpec(shape=(rows, state_width(decoder)), dtype=types.fp16)


def _embed(builder: Builder) -> Callable[..., Any]:
    def body(inputIds):  # noqa: ANN001, ANN202
        return mb.identity(x=builder.embed(inputIds), name="hidden")

    return body


def _head(builder: Builder) -> Callable[..., Any]:
    def body(hidden):  # noqa: ANN001, ANN202
        return mb.identity(x=builder.head(hidden), name="logits")

    return body


def _layers(builder: Builder, part: Part) -> Any:
    """A function over a part's layers, with embedding and head where they belong to it."""
    decoder, length, context = builder.decoder, builder.length, builder.context

    def run(x: Any, position: Any, mask: Any, states: list[Any]) -> Any:
        indices = builder.indices(position)
        if part.embeds:
            x = builder.embed(x)
        if part.layers[0] == 0:
            x = builder.enter(x, indices)
        width = decoder.kv_heads * decoder.head_dim
        turns, bias = builder.rope(indices), builder.alibi(indices)
        cache = Cache(position, mask, turns, bias, length, context, width, states)
        for index, number in enumerate(part.layers):
            x = builder.layer(x, decoder.layers[number], cache, index)
        if part.heads:
            return mb.identity(x=builder.head(x), name="logits")
        return mb.identity(x=x, name="hiddenOut")

    rest = [
        mb.TensorSpec(shape=(1,), dtype=types.int32),
        mb.TensorSpec(shape=(1, 1, length, context), dtype=types.fp16),
        *(state(len(part.layers) * context, decoder) for _ in range(2)),
    ]
    if part.embeds:

        def body(inputIds, position, causalMask, keyCache, valueCache):  # noqa: ANN001, ANN202
            return run(inputIds, position, causalMask, [keyCache, valueCache])

        return _function(body, [_ids(length), *rest])

    def later(hidden, position, causalMask, keyCache, valueCache):  # noqa: ANN001, ANN202
        return run(hidden, position, causalMask, [keyCache, valueCache])

    width = decoder.d_embedding if part.layers[0] == 0 else decoder.d_model
    fp32 = builder.fp32_residual and part.layers[0] != 0  # embeddings are fp16 anyway
    return _function(later, [_hidden(builder, width, fp32), *rest])


def program(made: dict[str, Any]) -> Any:
    """A MIL program of several functions; the first is its default."""
    whole = mil.Program()
    for name, function in made.items():
        whole.add_function(name, function)
    whole.default_function_name = next(iter(made))
    whole.export_as_multifunction = True
    return whole

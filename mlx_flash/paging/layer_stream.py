"""Whole layers in turn through a few buffers, read ahead of computing.

Where every row is needed for every token the access is a cycle, and no cache of recent rows helps:
the best is to keep some layers for good and to stream the others, in the order in which the model
asks for them, reading on across layers and across tokens (the naive and hybrid baselines of LLM in
a flash, table 2, done with overlap). A layer is streamed whole so that its matmuls sum up in the
same order as the dense model's: the result is the same to the bit.

Knows: the order of layers, which buffer holds which. Does not know: what is computed from them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import RowLayout

from .slots.slot_memory import SlotMemory, slot_bytes

Size = tuple[int, RowLayout]  # rows of a layer, and how they are laid out


@dataclass
class _Ahead:
    layer: int
    buffer: int
    reads: list[Future[None]]


class LayerStream:
    """Streams ``layers`` of the reader's file, cyclically, through ``buffers`` layer buffers.

    ``acquire`` hands out a layer's rows as soon as they are there; ``done`` says that an array
    which was computed from them has been asked for, after which the buffer is used again. One
    layer may be held at a time. When a layer is asked for out of turn (a forward pass was broken
    off), the cycle starts again at that layer. ``exact``: see ``SlotMemory``.
    """

    def __init__(
        self, reader: RowReader, layers: Sequence[int], buffers: int = 2, exact: bool = False
    ) -> None:
        if not layers or len(set(layers)) < len(layers) or buffers < 1:
            raise ValueError(f"no stream of layers {list(layers)} through {buffers} buffers")
        self.layers = list(layers)
        count = min(buffers, len(self.layers))
        self.buffers = [_sizes(reader, self.layers, exact) for _ in range(count)]
        self.wait_seconds = 0.0
        self.rows_acquired = 0
        self._reader = reader
        self._size = {i: _size(reader, i) for i in self.layers}
        layer_of = {size: i for i, size in self._size.items()}
        self._prepared = [
            {
                size: reader.prepare(
                    np.arange(memory.capacity),
                    np.arange(memory.capacity),
                    memory.views,
                    layer_of[size],
                )
                for size, memory in sizes.items()
            }
            for sizes in self.buffers
        ]
        self._ahead: deque[_Ahead] = deque()
        self._held: tuple[_Ahead, mx.array | None] | None = None
        self._next = 0

    def memories(self, layer: int) -> list[SlotMemory]:
        """Where the rows of a layer may be when it is acquired."""
        return [sizes[self._size[layer]] for sizes in self.buffers]

    def acquire(self, layer: int, before: mx.array) -> SlotMemory:
        """The rows of ``layer``, one a slot, as many slots as rows.

        Args:
            before: what the layer's input is computed from; it is set going while the rows come.
        """
        if layer not in self._size:
            raise ValueError(f"layer {layer} is not streamed, only {self.layers}")
        mx.async_eval(before)
        self._let_go()
        try:
            if not self._ahead or self._ahead[0].layer != layer:
                self._restart(layer)
            began = time.perf_counter()
            self._reader.wait(self._ahead[0].reads)
            self.wait_seconds += time.perf_counter() - began
        except BaseException:
            self._drain()
            raise
        ahead = self._ahead.popleft()
        self._held = (ahead, None)
        memory = self.buffers[ahead.buffer][self._size[layer]]
        self.rows_acquired += memory.capacity
        return memory

    def done(self, result: mx.array) -> None:
        """``result`` was built on the rows acquired last; their buffer is free once it is there."""
        if self._held is None:
            raise ValueError("no layer is held")
        ahead, _ = self._held
        self._held = (ahead, result)
        if ahead.layer == self.layers[-1]:
            self._let_go()  # the head computes next: read on behind it
        else:
            mx.async_eval(result)

    def close(self) -> None:
        """Forget what was read ahead; the buffers stay as they are."""
        held, self._held = self._held, None
        self._drain()
        if held and held[1] is not None:
            mx.eval(held[1])

    def _let_go(self) -> None:
        if self._held is None:
            return
        (ahead, result), self._held = self._held, None
        try:
            if result is not None:
                mx.eval(result)
            self._read_ahead(ahead.buffer)
        except BaseException:
            self._drain()
            raise

    def _read_ahead(self, buffer: int) -> None:
        layer = self.layers[self._next]
        self._next = (self._next + 1) % len(self.layers)
        prepared = self._prepared[buffer][self._size[layer]]
        self._ahead.append(_Ahead(layer, buffer, self._reader.submit(layer, prepared)))

    def _restart(self, layer: int) -> None:
        self._drain()
        self._next = self.layers.index(layer)
        for buffer in range(len(self.buffers)):
            self._read_ahead(buffer)

    def _drain(self) -> None:
        """Forget what was read ahead, once nothing writes into the buffers any more."""
        self._reader.drop([read for ahead in self._ahead for read in ahead.reads])
        self._ahead.clear()


def _size(reader: RowReader, layer: int) -> Size:
    extent = reader.file.layers[layer]
    return extent.rows, extent.layout


def _sizes(reader: RowReader, layers: Sequence[int], exact: bool) -> dict[Size, SlotMemory]:
    """One buffer, laid out for each kind of layer that there is; all share its memory."""
    sizes = sorted(
        dict.fromkeys(_size(reader, i) for i in layers),
        key=lambda size: size[0] * slot_bytes(size[1]),
        reverse=True,
    )
    rows, layout = sizes[0]
    largest = SlotMemory(layout, rows, exact=exact)
    rest = {(n, other): SlotMemory(other, n, share=largest, exact=exact) for n, other in sizes[1:]}
    return {sizes[0]: largest, **rest}

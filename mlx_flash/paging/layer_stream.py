"""Whole layers in turn through a few buffers, the next read while one is computed from.

Where every row is needed for every token the access is a cycle, and no cache of recent rows helps:
the best is to keep some layers for good and to stream the others, in the order in which the model
asks for them, reading on across layers and across tokens (the naive and hybrid baselines of LLM in
a flash, table 2, done with overlap). A layer is streamed whole so that its matmuls sum up in the
same order as the dense model's: the result is the same to the bit.
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

from .counters import Counters
from .slots.slot_memory import SlotMemory, slot_bytes

Size = tuple[int, RowLayout]  # rows of a layer, and how they are laid out


@dataclass
class _Fill:
    """A layer on its way into a buffer, or in it."""

    layer: int
    buffer: int
    reads: list[Future[None]]


class LayerStream:
    """Streams some layers of a row file, cyclically, through a few layer buffers.

    ``acquire`` hands out a layer's rows as soon as they are there; ``done`` names an array that is
    computed from them, after which the buffer is filled again. One layer may be held at a time.
    When a layer is asked for out of turn (a forward pass was broken off), the cycle starts again at
    that layer.

    Args:
        reader: reads the rows.
        layers: numbers of the layers, in the order in which the model asks for them.
        buffers: layers in memory at a time.
        unpadded: see ``SlotMemory``.
        counters: shared with whatever else counts; None for its own.
    """

    def __init__(
        self,
        reader: RowReader,
        layers: Sequence[int],
        buffers: int = 2,
        unpadded: bool = False,
        counters: Counters | None = None,
    ) -> None:
        if not layers or len(set(layers)) < len(layers) or buffers < 1:
            raise ValueError(f"no stream of layers {list(layers)} through {buffers} buffers")
        self.layers = list(layers)
        count = min(buffers, len(self.layers))
        self.buffers = [_sizes(reader, self.layers, unpadded) for _ in range(count)]
        self.counters = Counters() if counters is None else counters
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
        self._filling: deque[_Fill] = deque()
        self._held: tuple[_Fill, mx.array | None] | None = None
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
            if not self._filling or self._filling[0].layer != layer:
                self._restart(layer)
            began = time.perf_counter()
            self._reader.wait(self._filling[0].reads)
            self.counters.wait_seconds += time.perf_counter() - began
        except BaseException:
            self._drain()
            raise
        fill = self._filling.popleft()
        self._held = (fill, None)
        memory = self.buffers[fill.buffer][self._size[layer]]
        self.counters.misses += memory.capacity
        return memory

    def done(self, result: mx.array) -> None:
        """``result`` was built on the rows acquired last; their buffer is free once it is there."""
        if self._held is None:
            raise ValueError("no layer is held")
        fill, _ = self._held
        self._held = (fill, result)
        if fill.layer == self.layers[-1]:
            self._let_go()  # the head computes next: read on behind it
        else:
            mx.async_eval(result)

    def close(self) -> None:
        """Drop the reads that are under way; buffers stay as they are."""
        held, self._held = self._held, None
        self._drain()
        if held and held[1] is not None:
            mx.eval(held[1])

    def _let_go(self) -> None:
        if self._held is None:
            return
        (fill, result), self._held = self._held, None
        try:
            if result is not None:
                mx.eval(result)
            self._fill(fill.buffer)
        except BaseException:
            self._drain()
            raise

    def _fill(self, buffer: int) -> None:
        """Begin to read the layer whose turn it is."""
        layer = self.layers[self._next]
        self._next = (self._next + 1) % len(self.layers)
        prepared = self._prepared[buffer][self._size[layer]]
        self._filling.append(_Fill(layer, buffer, self._reader.submit(layer, prepared)))

    def _restart(self, layer: int) -> None:
        self._drain()
        self._next = self.layers.index(layer)
        for buffer in range(len(self.buffers)):
            self._fill(buffer)

    def _drain(self) -> None:
        """Drop reads; nothing writes into the buffers any more when this returns."""
        self._reader.drop([read for fill in self._filling for read in fill.reads])
        self._filling.clear()


def _size(reader: RowReader, layer: int) -> Size:
    extent = reader.file.layers[layer]
    return extent.rows, extent.layout


def _sizes(reader: RowReader, layers: Sequence[int], unpadded: bool) -> dict[Size, SlotMemory]:
    """One buffer, laid out for each kind of layer that there is; all share its memory."""
    sizes = sorted(
        dict.fromkeys(_size(reader, i) for i in layers),
        key=lambda size: size[0] * slot_bytes(size[1]),
        reverse=True,
    )
    rows, layout = sizes[0]
    largest = SlotMemory(layout, rows, unpadded=unpadded)
    rest = {
        (n, other): SlotMemory(other, n, share=largest, unpadded=unpadded) for n, other in sizes[1:]
    }
    return {sizes[0]: largest, **rest}

"""``overlap``, ``streaming``, ``lookahead``: a token's time against what it is made of."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.row_weights import bind_arrays
from mlx_flash.runtime.paged_model import LOOKAHEAD

from .bench import Bench, Seen, switches

TARGETS = {"overlap": 1.3, "streaming": 4.0}


class StreamedSwitch(nn.Module):
    """The baseline: all experts of a layer streamed from flash for every token, read ahead."""

    def __init__(self, switch: nn.Module, layer: int, stream: LayerStream) -> None:
        super().__init__()
        self.switch, self.layer, self._stream = switch, layer, stream

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        memory = self._stream.acquire(self.layer, x)
        bind_arrays(self.switch, memory.arrays)
        y = self.switch(x, indices)
        self._stream.done(y)
        return y


def overlap(bench: Bench) -> dict:
    """Time per token over the longer of reading alone and computing alone, the same tokens."""
    tokens, reading, computing, waiting, ratios = [], [], [], [], []
    for _ in range(bench.repeats):
        before, chunk = bench.state(), bench.take(bench.options.tokens)
        seen = bench.decode(chunk)
        read = bench.replay(seen.reads, bench.model.flash.reader) / seen.tokens
        compute = bench.compute(chunk, before).each
        tokens.append(seen.each)
        waiting.append(seen.stats.wait_seconds / seen.tokens)
        reading.append(read)
        computing.append(compute)
        ratios.append(seen.each / max(read, compute))
    ms = [1e3 * statistics.median(x) for x in (tokens, reading, computing, waiting)]
    return {
        **dict(zip(("ms/token", "read alone", "compute alone", "of it waiting"), ms, strict=True)),
        "ratio": statistics.median(ratios),
        "from, to": [min(ratios), max(ratios)],
        "target": TARGETS["overlap"],
    }


def streaming(bench: Bench) -> dict:
    """Tokens/s against streaming every expert of every layer for every token.

    Where computing takes longer than reading, as on few cores with a fast disk, that is what the
    ratio tells. Reading alone, of ours and of the baseline's, is what a machine gets whose
    computing takes no time.
    """
    model = bench.model
    stream = LayerStream(model.flash.reader, range(bench.options.layers), unpadded=True)
    ours, own_reads, theirs, alone = [], [], [], []
    nothing = mx.zeros((1,))
    for _ in range(max(2, bench.repeats // 2)):
        seen = bench.decode(bench.take(bench.options.tokens))
        ours.append(seen.each)
        own_reads.append(bench.replay(seen.reads, model.flash.reader) / seen.tokens)
        own_switches = switches(model)
        for i, (layer, own) in enumerate(zip(model.layers, own_switches, strict=True)):
            layer.mlp.switch_mlp = StreamedSwitch(own.switch, i, stream)
        try:
            bench.decode(bench.words[:1])
            theirs.append(bench.decode(bench.words[1:3]).each)
        finally:
            for layer, own in zip(model.layers, own_switches, strict=True):
                layer.mlp.switch_mlp = own
        began = time.perf_counter()
        for i in stream.layers:
            stream.acquire(i, nothing)
            stream.done(nothing)
        alone.append(time.perf_counter() - began)
        stream.close()
    return {
        "ms/token": [round(1e3 * x) for x in ours],
        "reading alone, ms/token": [round(1e3 * x) for x in own_reads],
        "streaming, ms/token": [round(1e3 * x) for x in theirs],
        "streaming, reading alone, ms/token": [round(1e3 * x) for x in alone],
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "ratio to its reading alone": statistics.median(
            b / a for a, b in zip(ours, alone, strict=True)
        ),
        "ratio of reading alone": statistics.median(
            b / a for a, b in zip(own_reads, alone, strict=True)
        ),
        "target": TARGETS["streaming"],
    }


def lookahead(bench: Bench) -> dict:
    """With and without reading ahead what the next layer's router says, in turns."""
    runs: dict[bool, list[Seen]] = {True: [], False: []}
    try:
        for repeat in range(bench.repeats):
            before, chunk = bench.state(), bench.take(bench.options.tokens)
            for ahead in (True, False) if repeat % 2 else (False, True):
                bench.restore(before)
                bench.prefetch(bench.model, ahead)
                runs[ahead].append(bench.decode(chunk))
                bench.settle()
    finally:
        bench.prefetch(bench.model, LOOKAHEAD["expert"])
    found: dict = {}
    for ahead, seen in runs.items():
        total = {
            name: sum(getattr(s.stats, name) for s in seen)
            for name in ("hits", "misses", "foretold", "useful", "bytes_read", "wait_seconds")
        }
        tokens, needed = sum(s.tokens for s in seen), total["hits"] + total["misses"]
        found["with" if ahead else "without"] = {
            "tokens/s": 1 / statistics.median(s.each for s in seen),
            "in slots when needed": total["hits"] / needed,
            "brought by the guess": total["useful"] / needed,
            "guesses to read that were of use": total["useful"] / max(1, total["foretold"]),
            "MB/token": total["bytes_read"] / tokens / 1e6,
            "MB/token wasted": (total["foretold"] - total["useful"]) * bench.stride / tokens / 1e6,
            "ms/token waiting": 1e3 * total["wait_seconds"] / tokens,
        }
    pairs = zip(runs[False], runs[True], strict=True)
    found["tokens/s with over without"] = statistics.median(a.each / b.each for a, b in pairs)
    return found

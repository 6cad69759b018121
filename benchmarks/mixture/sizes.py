"""``bytes`` and ``kernels``: what an expert takes on flash, and what MLX takes to compute it."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.support.converted import converted
from benchmarks.support.random_llama import random_llama

from .bench import Bench
from .model import BITS, FFN, GROUP, HIDDEN, TOP_K, checkpoint

TARGETS = {"experts": 1.02, "neurons": 1.15}


def expert_bytes(bench: Bench) -> dict:
    """Bytes from one row to the next over 4.5 bits a weight; scales are bfloat16."""
    tiny = converted("mixture-bytes", lambda path: checkpoint(path, 1, 512, "bfloat16", experts=8))
    llama = converted(
        "neuron-bytes",
        lambda path: random_llama(path, HIDDEN, 512, 1, vocab=512, hidden_act="relu"),
        quantize=True,
    )
    found = {}
    for label, directory, weights in (
        ("experts", tiny, 3 * HIDDEN * FFN),
        ("neurons", llama, 3 * HIDDEN),
    ):
        stride, ideal = directory.rows.layout.stride, weights * (BITS + 32 / GROUP) / 8
        found[label] = {
            "unit": directory.unit, "stride": stride, "ideal": ideal, "ratio": stride / ideal,
            "target": TARGETS[label],
        }  # fmt: skip
    bits = 8 * bench.stride / (3 * HIDDEN * FFN)
    found["experts of the runs"] = {"scales": bench.options.scales, "bits a weight": bits}
    return found


def kernels(bench: Bench) -> dict:
    """Milliseconds that one layer's eight experts take a token, by the type of input and scales."""
    count = 32

    def stack(rows: int, width: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        words = bench.random.integers(0, 2**32, (count, rows, width * BITS // 32), np.uint32)
        scales = mx.full((count, rows, width // GROUP), 0.005).astype(dtype)
        return mx.array(words), scales, -7.5 * scales

    def product(x: mx.array, packed: tuple[mx.array, ...], index: mx.array) -> mx.array:
        return mx.gather_qmm(
            x, *packed, rhs_indices=index, transpose=True, group_size=GROUP, bits=BITS
        )

    cases = {
        "float32": (mx.float32, mx.float32),
        "bfloat16": (mx.bfloat16, mx.bfloat16),
        f"float32, scales of {count} slots bfloat16": (mx.float32, mx.bfloat16),
    }
    times: dict[str, list[float]] = {label: [] for label in cases}
    for label, (dtype, scales) in cases.items():
        up, gate, down = (stack(*s, scales) for s in ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)))
        for repeat in range(bench.repeats + 1):
            chosen = bench.random.permutation(count)[:TOP_K].astype(np.uint32)
            index, x = mx.array(chosen[None, None]), mx.ones((1, 1, 1, 1, HIDDEN)).astype(dtype)
            mx.eval(index, x, up, gate, down)
            began = time.perf_counter()
            hidden = nn.silu(product(x, gate, index)) * product(x, up, index)
            mx.eval(product(hidden, down, index))
            if repeat:
                times[label].append(1e3 * (time.perf_counter() - began))
    return {label: [statistics.median(t), min(t)] for label, t in times.items()} | {
        "each": "median, least"
    }

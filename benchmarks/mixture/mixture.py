"""A mixture of experts paged from flash: bytes, reads, overlap, speed, guesses, policies, a prompt.

The model has the shape of Qwen3-30B-A3B (128 experts a layer, 8 a token, 2048 wide, 768 neurons an
expert, 32 heads, 4 of keys) with fewer layers, random weights, in mlx-community's format: 4 bits in
groups of 64, the router 8 bits. The vocabulary shrinks as the layers do, so that the head takes the
share of a token that it has in the full model. It is converted by the package and decodes the words
of a novel, one at a time, whatever it would say itself: every run of a comparison sees the same
tokens, and begins with the same experts in slots. The budget (``--share``) is half of the model.

Scales are float32 here, which makes an expert 5 bits a weight, not 4.5: MLX's CPU back end computes
packed matmuls in float32 many times faster than in bfloat16, and what is to be seen is reading.
``bytes`` is of rows with bfloat16 scales, ``--scales bfloat16`` runs all of it with them.

What random weights can say: bytes, reads, times for a given share of hits. Which experts are chosen
is made up: the router's rows have lengths of a log-normal (``SPREAD``), so that a few experts are
wanted often and none is never; a token's choice depends on the word, and less on what was before.
Hits, and what a guess is worth, are those of this model; a trained one has others. ``routing`` says
how uneven it came out.

    python benchmarks/mixture.py                             # 14 GB made; an hour on two cores
    python benchmarks/mixture.py --layers 2 --tokens 4 --pairs 2 --prompt-tokens 32   # to try it
    python benchmarks/mixture.py --only reads,overlap

Knows: the model, the package's pager and its reader, fio. Does not know: quality of text.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.support import common
from benchmarks.support.common import OUT
from benchmarks.support.opt_shape import words
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging.expert_switch import FlashSwitch
from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.policies import LFU, LRU, Belady, Policy, SlidingWindow
from mlx_flash.paging.row_cache import RowCache
from mlx_flash.paging.row_weights import bind_arrays
from mlx_flash.paging.slot_memory import SlotMemory
from mlx_flash.paging.slot_table import SlotTable
from mlx_flash.runtime import load
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.runtime.paged_model import FlashStats
from mlx_flash.storage import huge_pages
from mlx_flash.storage.direct_io import open_direct
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.scatter_list import PreparedRead

FULL_LAYERS, FULL_VOCAB = 48, 151936  # of Qwen3-30B-A3B
HIDDEN, FFN, EXPERTS, TOP_K = 2048, 768, 128, 8
HEADS, KV_HEADS, HEAD = 32, 4, 128
BITS, GROUP = 4, 64
SPREAD = 0.2  # of the logarithm of a router row's length
SHARP = 2.0  # standard deviation of an average expert's score
BRANCH = 1.5  # what the last matrices of attention and experts multiply by, to be felt
START = 20_000  # words into the novel
TARGETS = {"experts": 1.02, "neurons": 1.15, "reads": 0.9, "overlap": 1.3, "streaming": 4.0}
POLICIES: dict[str, Callable[[], Policy]] = {
    "window 4": lambda: SlidingWindow(EXPERTS, 4),
    "lru": lambda: LRU(EXPERTS),
    **{f"lfu {n}": lambda n=n: LFU(EXPERTS, n) for n in (8, 32, 128, 512)},
}
SHARES = (0.25, 0.5)  # of the experts that have slots, for the policies


class Writer:
    """Random tensors in mlx-community's format, a shard at a time."""

    def __init__(self, path: Path, dtype: mx.Dtype) -> None:
        self.path, self.dtype = path, dtype
        self.random = np.random.default_rng(0)
        self.arrays: dict[str, mx.array] = {}
        self.where: dict[str, str] = {}

    def packed(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """A matrix, or a stack of them, whose products have ``gain`` times the input's deviation.

        Random words are numbers from 0 to 15 about 7.5 with a deviation of 4.61. Scales differ by
        up to a quarter.
        """
        *many, width = shape
        words = self.random.integers(0, 2**32, (*many, width * BITS // 32), np.uint32)
        scale = np.float32(gain * width**-0.5 / 4.61)
        noise = self.random.random((*many, width // GROUP), np.float32)
        scales = mx.array(scale * (0.75 + noise / 2)).astype(self.dtype)
        self.arrays[f"{name}.weight"] = mx.array(words)
        self.arrays[f"{name}.scales"] = scales
        self.arrays[f"{name}.biases"] = (-7.5 * scales.astype(mx.float32)).astype(self.dtype)

    def ones(self, name: str, width: int, value: float = 1.0) -> None:
        self.arrays[f"{name}.weight"] = mx.full((width,), value).astype(self.dtype)

    def router(self, name: str, experts: int) -> None:
        """Rows of uneven length: an expert with a long one is among the best more often."""
        rows = self.random.standard_normal((experts, HIDDEN), np.float32)
        length = np.exp(SPREAD * self.random.standard_normal((experts, 1), np.float32))
        weight = mx.array(rows * length * np.float32(SHARP * HIDDEN**-0.5)).astype(self.dtype)
        found = mx.quantize(weight, group_size=GROUP, bits=8)
        for suffix, array in zip(("weight", "scales", "biases"), found, strict=True):
            self.arrays[f"{name}.{suffix}"] = array

    def shard(self) -> None:
        """Write what there is."""
        name = f"model-{len(set(self.where.values())) + 1:05d}.safetensors"
        mx.save_safetensors(str(self.path / name), self.arrays, {"format": "mlx"})
        self.where |= dict.fromkeys(self.arrays, name)
        self.arrays = {}


def checkpoint(path: Path, layers: int, vocab: int, dtype: str, experts: int = EXPERTS) -> Path:
    """Made if it is not there; layer by layer, so that it takes little memory."""
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    writer = Writer(path, getattr(mx, dtype))
    for name in ("model.embed_tokens", "lm_head"):
        writer.packed(name, vocab, HIDDEN, gain=HIDDEN**0.5 if "embed" in name else 1.0)
    writer.ones("model.norm", HIDDEN)
    writer.shard()
    quantization: dict = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            writer.packed(f"{at}self_attn.{name}", heads * HEAD, HIDDEN)
        writer.packed(f"{at}self_attn.o_proj", HIDDEN, HEADS * HEAD, gain=BRANCH)
        writer.ones(f"{at}self_attn.q_norm", HEAD, 2.0)  # attention that looks at some, not all
        writer.ones(f"{at}self_attn.k_norm", HEAD)
        writer.ones(f"{at}input_layernorm", HIDDEN)
        writer.ones(f"{at}post_attention_layernorm", HIDDEN)
        writer.router(f"{at}mlp.gate", experts)
        quantization[f"{at}mlp.gate"] = {"group_size": GROUP, "bits": 8}
        writer.packed(f"{at}mlp.switch_mlp.gate_proj", experts, FFN, HIDDEN)
        writer.packed(f"{at}mlp.switch_mlp.up_proj", experts, FFN, HIDDEN)
        writer.packed(f"{at}mlp.switch_mlp.down_proj", experts, HIDDEN, FFN, gain=2 * BRANCH)
        writer.shard()
    index = {"metadata": {}, "weight_map": writer.where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from support.tiny import write_tokenizer

    write_tokenizer(path, 300)
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": 6144, "moe_intermediate_size": FFN, "num_hidden_layers": layers,
        "num_experts": experts, "num_experts_per_tok": TOP_K, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "rms_norm_eps": 1e-6,
        "vocab_size": vocab, "max_position_embeddings": 40960, "rope_theta": 1e6,
        "tie_word_embeddings": False, "hidden_act": "silu", "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": dtype,
        "quantization": quantization,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def made(name: str, source: Callable[[Path], Path], **how: object) -> ModelDirectory:
    """A converted directory; made if it is not there."""
    if not (OUT / name).exists():
        convert(str(source(OUT / f"{name}-source")), OUT / name, **how)
    return ModelDirectory(OUT / name)


@dataclass
class State:
    """Which experts are in which slots, and what the policy knows."""

    tables: dict[int, SlotTable]
    policies: dict[int, Policy]


@dataclass
class Seen:
    """What a run did: seconds and counters, each a token; what was read, in order."""

    tokens: int = 0
    seconds: float = 0.0
    stats: FlashStats = field(default_factory=FlashStats)
    reads: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def each(self) -> float:
        return self.seconds / self.tokens


class NoReads:
    """Stands where the reader was and finds every row there: what computing alone takes."""

    def prepare(self, *args: object) -> None:
        pass

    def submit(self, *args: object) -> list:
        return []

    def wait(self, reads: list) -> None:
        pass

    drop = wait
    read = prepare


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


class Bench:
    """The loaded model and the words that it is given, the same ones for all who compare."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        layers, dtype = options.layers, options.scales
        vocab = options.vocab or round(FULL_VOCAB * layers / FULL_LAYERS / GROUP) * GROUP
        self.directory = made(
            f"mixture-{layers}-{vocab}-{dtype}", lambda path: checkpoint(path, layers, vocab, dtype)
        )
        self.stride = self.directory.rows.layout.stride
        self.words = words(vocab)[START:]
        self.at = 0
        self.repeats = options.pairs
        self.random = np.random.default_rng(0)

    @property
    def nbytes(self) -> int:
        """Of the whole model on disk."""
        return sum(file.stat().st_size for file in self.directory.path.glob("*.safetensors"))

    def take(self, count: int) -> np.ndarray:
        """The next words."""
        self.at += count
        return self.words[self.at - count : self.at]

    @cached_property
    def model(self) -> nn.Module:
        """Loaded with the budget, slots filled by some tokens; reads ahead as the package does."""
        ram = int(self.options.share * self.nbytes)
        model = load_model(self.directory, PagingOptions(ram=ram, lookahead=True))
        flash = model.flash
        if len(flash.caches) < self.options.layers:
            raise RuntimeError("the budget holds every expert of some layers; take a smaller one")
        least = min(cache.table.capacity for cache in flash.caches.values())
        if least < 2 * TOP_K:
            raise RuntimeError(f"only {least} slots a layer: few layers need a larger --share")
        self.guesses = {i: switch._ahead for i, switch in enumerate(_switches(model))}
        self.guess(model, load.LOOKAHEAD)
        slots = [cache.table.capacity for cache in flash.caches.values()]
        print(
            f"  budget {ram / 1e9:.2f} GB of {self.nbytes / 1e9:.2f}: {min(slots)} to {max(slots)} "
            f"slots of {EXPERTS} experts a layer, {self.stride / 1e6:.2f} MB each"
        )
        common.warm([self.directory.rows.path])
        began = time.perf_counter()
        self.decode(self.take(self.options.warm), model)
        print(f"  {self.options.warm} tokens to fill slots, {time.perf_counter() - began:.0f} s")
        return model

    def guess(self, model: nn.Module, ahead: bool) -> None:
        """Read ahead or not, from now on."""
        for i, switch in enumerate(_switches(model)):
            switch.ahead(self.guesses[i] if ahead else None)

    @property
    def caches(self) -> dict[int, RowCache]:
        return self.model.flash.caches

    def decode(self, tokens: np.ndarray, model: nn.Module | None = None) -> Seen:
        """Token by token, from an empty KV cache."""
        model = model or self.model
        seen = Seen(tokens=len(tokens))
        with _recorded(model.flash.caches, seen.reads):
            cache = make_prompt_cache(model)
            before, began = model.flash.stats(), time.perf_counter()
            for token in tokens:
                mx.eval(model(mx.array([[int(token)]]), cache=cache))
            seen.seconds = time.perf_counter() - began
            seen.stats = model.flash.stats() - before
        return seen

    def state(self) -> State:
        self.settle()
        return State(
            {i: copy.deepcopy(cache.table) for i, cache in self.caches.items()},
            {i: copy.deepcopy(cache.policy) for i, cache in self.caches.items()},
        )

    def settle(self) -> None:
        """Wait for what was foretold."""
        for cache in self.caches.values():
            self.model.flash.reader.wait([f for reads in cache._pending.values() for f in reads])
            cache._pending.clear()
            cache._foretold.clear()

    def restore(self, state: State, read: bool = True) -> None:
        """Put that state back; ``read`` what the slots do not hold any more."""
        self.settle()
        for i, cache in self.caches.items():
            table = copy.deepcopy(state.tables[i])
            slots = np.flatnonzero((table.row_in >= 0) & (table.row_in != cache.table.row_in))
            slots = slots[np.argsort(table.row_in[slots])]
            if read and slots.size:
                reader, views = self.model.flash.reader, cache.memory.views
                mx.eval(cache._built_on)
                reader.read(i, table.row_in[slots], slots, views)
            cache.table, cache.policy = table, copy.deepcopy(state.policies[i])

    def replay(self, reads: list[tuple[int, np.ndarray, np.ndarray]], reader: RowReader) -> float:
        """Seconds for a run's reads alone, into the slots that they were for."""
        caches = self.caches
        began = time.perf_counter()
        for layer, rows, slots in reads:
            reader.read(layer, rows, slots, caches[layer].memory.views)
        return time.perf_counter() - began

    def compute(self, tokens: np.ndarray, before: State) -> Seen:
        """The same tokens when nothing is read; slots then hold what they held."""
        after = self.state()
        self.restore(before, read=False)
        real = self.model.flash.reader
        for cache in self.caches.values():
            cache._reader = NoReads()
        try:
            return self.decode(tokens)
        finally:
            for cache in self.caches.values():
                cache._reader = real
                cache._pending.clear()
            self.restore(after, read=False)


def _switches(model: nn.Module) -> list[FlashSwitch]:
    return [layer.mlp.switch_mlp for layer in model.layers]


class Recording:
    """Stands before a reader and keeps what it is asked for."""

    def __init__(self, reader: RowReader, reads: list) -> None:
        self.reader, self.reads = reader, reads

    def __getattr__(self, name: str) -> object:
        return getattr(self.reader, name)

    def read(self, layer: int, rows: np.ndarray, slots: np.ndarray, out: list) -> None:
        self.reads.append((layer, rows.copy(), slots.copy()))
        self.reader.read(layer, rows, slots, out)

    def submit(self, layer: int, read: PreparedRead, behind: bool = False) -> list:
        if not isinstance(self.reader, NoReads):
            self.reads.append((layer, read.rows.copy(), read.slots.copy()))
        return self.reader.submit(layer, read, behind)


@contextmanager
def _recorded(caches: dict[int, RowCache], reads: list) -> Iterator[None]:
    """Keep what the caches read."""
    real = {i: cache._reader for i, cache in caches.items()}
    for i, cache in caches.items():
        cache._reader = Recording(real[i], reads)
    try:
        yield
    finally:
        for i, cache in caches.items():
            cache._reader = real[i]


def expert_bytes(bench: Bench) -> dict:
    """Bytes from one row to the next over 4.5 bits a weight; scales are bfloat16."""
    tiny = made("mixture-bytes", lambda path: checkpoint(path, 1, 512, "bfloat16", experts=8))
    llama = made("neuron-bytes", _relu_llama, quantize=True)
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


def _relu_llama(path: Path) -> Path:
    source = common.random_llama(path, HIDDEN, 512, 1, vocab=512)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    return source


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


def routing(bench: Bench) -> dict:
    """How uneven the made-up choice of experts is, over the recorded trace."""
    trace = recorded(bench)
    busiest, repeated = [], []
    for layer in trace:
        counts = np.sort(np.bincount(layer.ravel(), minlength=EXPERTS))[::-1]
        busiest.append([counts[: EXPERTS // n].sum() / counts.sum() for n in (8, 4, 2)])
        same = [np.isin(b, a).mean() for a, b in itertools.pairwise(layer)]
        repeated.append(np.mean(same))
    eighth, quarter, half = np.mean(busiest, axis=0)
    return {
        "tokens": len(trace[0]),
        "uses by the busiest eighth, quarter, half": [eighth, quarter, half],
        "never used, a layer": np.mean([EXPERTS - np.unique(t).size for t in trace]),
        "of the last token's experts too": np.mean(repeated),
    }


def reads(bench: Bench) -> dict:
    """Decoding's own reads, alone and into its own slots, against fio's random reads in turns.

    fio has ordinary pages, and its speed jumps by a factor of up to four between runs. ``bare`` is
    ``os.preadv`` of the same size and depth into huge ones, never waiting for a whole layer's reads
    as decoding has to: the stricter yardstick.
    """
    seen = bench.decode(bench.take(bench.options.tokens))
    reader, path = bench.model.flash.reader, bench.directory.rows.path
    pieces = -(-bench.stride // reader.request_bytes)
    block = -(-bench.stride // pieces // 4096) * 4096
    depth = round(statistics.mean(pieces * rows.size for _, rows, _ in seen.reads))
    total = sum(rows.size for _, rows, _ in seen.reads) * bench.stride
    ours, fio, bare = [], [], []
    for _ in range(bench.repeats):
        ours.append(total / bench.replay(seen.reads, reader))
        fio.append(common.fio(path, block, depth, "randread"))
        bare.append(_bare(path, block, depth, total // block))
    return {
        "MB/token": total / seen.tokens / 1e6,
        "experts a read": statistics.mean(rows.size for _, rows, _ in seen.reads),
        "request": block,
        "under way": depth,
        "MB/s": [round(x / 1e6) for x in ours],
        "fio MB/s": [round(x / 1e6) for x in fio],
        "bare MB/s": [round(x / 1e6) for x in bare],
        "ratio": statistics.median(a / b for a, b in zip(ours, fio, strict=True)),
        "ratio to bare": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
        "target": TARGETS["reads"],
    }


def _bare(path: Path, block: int, depth: int, count: int, space: int = 512 << 20) -> float:
    """Bytes per second of random reads into huge pages, as much memory as slots are, or nearly."""
    fd, _ = open_direct(path)
    places = np.random.default_rng().integers(0, (path.stat().st_size - block) // 4096, count)
    buffers = huge_pages.buffers(space // block, block // 4096 * 4096)
    for buffer in buffers:
        buffer[:] = 0
    work = iter(zip((4096 * places).tolist(), itertools.cycle(buffers), strict=False))

    def read(_: int) -> int:
        return sum(os.preadv(fd, [buffer], at) for at, buffer in work)

    with ThreadPoolExecutor(depth) as pool:
        began = time.perf_counter()
        total = sum(pool.map(read, range(depth)))
        seconds = time.perf_counter() - began
    os.close(fd)
    return total / seconds


def requests(bench: Bench) -> dict:
    """The same reads cut into requests of other sizes, into huge pages and ordinary ones."""
    seen = bench.decode(bench.take(bench.options.tokens))
    file, caches = bench.directory.rows, bench.caches
    most = max(cache.table.capacity for cache in caches.values())
    memories = {"huge": SlotMemory(file.layout, most)}
    ask, huge_pages.ask_for = huge_pages.ask_for, lambda memory: False
    try:
        memories["ordinary"] = SlotMemory(file.layout, most)
    finally:
        huge_pages.ask_for = ask
    total = sum(rows.size for _, rows, _ in seen.reads) * bench.stride
    readers = {
        kib: RowReader(file, request_bytes=kib << 10) for kib in (256, 512, 1024, 2048, 4096)
    }
    speeds: dict[tuple[str, int], list[float]] = {}
    for _ in range(bench.repeats):
        for pages, memory in memories.items():
            for kib, reader in readers.items():
                began = time.perf_counter()
                for layer, rows, slots in seen.reads:
                    reader.read(layer, rows, slots, memory.views)
                speed = total / (time.perf_counter() - began)
                speeds.setdefault((pages, kib), []).append(round(speed / 1e6))
    for reader in readers.values():
        reader.close()
    found: dict = {}
    for (pages, kib), values in speeds.items():
        row = found.setdefault(f"{pages} pages, MB/s (least, most)", {})
        row[f"{kib} KiB"] = [statistics.median(values), min(values), max(values)]
    return found


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
    stream = LayerStream(model.flash.reader, range(bench.options.layers), exact=True)
    ours, own_reads, theirs, alone = [], [], [], []
    nothing = mx.zeros((1,))
    for _ in range(max(2, bench.repeats // 2)):
        seen = bench.decode(bench.take(bench.options.tokens))
        ours.append(seen.each)
        own_reads.append(bench.replay(seen.reads, model.flash.reader) / seen.tokens)
        switches = _switches(model)
        for i, (layer, own) in enumerate(zip(model.layers, switches, strict=True)):
            layer.mlp.switch_mlp = StreamedSwitch(own.switch, i, stream)
        try:
            bench.decode(bench.words[:1])
            theirs.append(bench.decode(bench.words[1:3]).each)
        finally:
            for layer, own in zip(model.layers, switches, strict=True):
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
                bench.guess(bench.model, ahead)
                runs[ahead].append(bench.decode(chunk))
                bench.settle()
    finally:
        bench.guess(bench.model, load.LOOKAHEAD)
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


def trace_path(bench: Bench) -> Path:
    count = bench.options.prompt_tokens
    return OUT / f"{bench.directory.path.name}-trace-{count}.npz"


def recorded(bench: Bench) -> list[np.ndarray]:
    """Experts chosen, of each layer [tokens, 8], for the words of the prompt."""
    if not trace_path(bench).exists():
        prompt(bench)
    with np.load(trace_path(bench)) as file:
        return [file[f"arr_{i}"] for i in range(bench.options.layers)]


def policies(bench: Bench) -> dict:
    """Hits of policies over those of Belady's optimum, on the recorded choices of experts."""
    trace = [[np.unique(experts) for experts in layer] for layer in recorded(bench)]
    warm = len(trace[0]) // 4
    ratios: dict = {"tokens, of them to warm up": [len(trace[0]), warm]}

    def hits(capacity: int, make: Callable[[list[np.ndarray]], Policy]) -> int:
        total = 0
        for layer in trace:
            table, policy = SlotTable(EXPERTS, capacity), make(layer)
            found = [int(common.fetch(table, policy, experts).sum()) for experts in layer]
            total += sum(found[warm:])
        return total

    uses = sum(experts.size for layer in trace for experts in layer[warm:])
    for share in SHARES:
        capacity = round(share * EXPERTS)
        best = hits(capacity, lambda layer: Belady(EXPERTS, layer))
        ratios[f"{share:.0%} of the experts"] = {
            "belady, hits / uses": best / uses,
            **{
                f"{label} / belady": hits(capacity, lambda _, m=make: m()) / best
                for label, make in POLICIES.items()
            },
        }
    return ratios


def prompt(bench: Bench) -> dict:
    """A prompt: its time, and bytes read over those of all experts needed in each of its chunks."""
    model, count = bench.model, bench.options.prompt_tokens
    chosen: list[list[np.ndarray]] = [[] for _ in model.layers]
    call = FlashSwitch.__call__

    def watched(self: FlashSwitch, x: mx.array, indices: mx.array, *args, **kwargs) -> mx.array:
        y = call(self, x, indices, *args, **kwargs)
        chosen[self.layer].append(np.array(indices).reshape(-1, TOP_K))
        return y

    FlashSwitch.__call__ = watched
    try:
        tokens = mx.array(bench.words[None, :count])
        before, began = model.flash.stats(), time.perf_counter()
        mx.eval(model(tokens, cache=make_prompt_cache(model))[:, -1])
        seconds = time.perf_counter() - began
        spent = model.flash.stats() - before
    finally:
        FlashSwitch.__call__ = call
    np.savez(trace_path(bench), *[np.concatenate(layer) for layer in chosen])
    needed = sum(np.unique(chunk).size for layer in chosen for chunk in layer)
    return {
        "tokens": count,
        "chunks": len(chosen[0]),
        "seconds": seconds,
        "waiting": spent.wait_seconds,
        "GB read": spent.bytes_read / 1e9,
        "experts needed, a layer and chunk": needed / len(chosen) / len(chosen[0]),
        "read / needed once per layer and chunk": spent.bytes_read / (needed * bench.stride),
    }


PARTS: dict[str, Callable[[Bench], dict]] = {
    "bytes": expert_bytes,
    "kernels": kernels,
    "prompt": prompt,
    "routing": routing,
    "policies": policies,
    "reads": reads,
    "requests": requests,
    "overlap": overlap,
    "streaming": streaming,
    "lookahead": lookahead,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="comma-separated: " + ",".join(PARTS))
    parser.add_argument("--layers", type=int, default=18, help="0.38 GB each")
    parser.add_argument("--vocab", type=int, help="default: as the layers are to the full model's")
    parser.add_argument("--scales", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--share", type=float, default=0.5, help="of the model, that is the budget")
    parser.add_argument("--warm", type=int, default=32, help="tokens before any figure counts")
    parser.add_argument("--tokens", type=int, default=16, help="of one run")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(PARTS)
    OUT.mkdir(exist_ok=True)
    results: dict = {"machine": common.machine(), "date": date.today().isoformat()}
    print(f"{results['machine']}, {results['date']}")
    bench = Bench(options)
    for name in wanted:
        print(f"\n{name}: {inspect.getdoc(PARTS[name])}", flush=True)
        try:
            results[name] = PARTS[name](bench)
        except RuntimeError as error:
            results[name] = {"skipped": str(error)}
        results[name]["load"] = [round(x, 1) for x in os.getloadavg()]
        for label, value in results[name].items():
            print(f"  {label:<42} {_text(value)}", flush=True)
    path = OUT / f"{bench.directory.path.name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(earlier | results, indent=1, default=float))
    print("\n" + json.dumps(results, default=float))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{label} {_text(inner)}" for label, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

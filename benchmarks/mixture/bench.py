"""The loaded model, the words that it is given, and how its reads are noted and done again."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.support.converted import converted
from benchmarks.support.fio import warm
from benchmarks.support.no_reads import NoReads
from benchmarks.support.synthetic_opt import words
from mlx_flash.paging.expert_switch import FlashSwitch
from mlx_flash.paging.policies import Policy
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.paging.slots.slot_table import SlotTable
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.runtime.paged_model import LOOKAHEAD, FlashStats
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.scatter_list import PreparedRead

from .model import EXPERTS, FULL_LAYERS, FULL_VOCAB, GROUP, TOP_K, checkpoint

START = 20_000  # words into the novel


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


class Bench:
    """The loaded model and the words that it is given, the same ones for all who compare."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        layers, dtype = options.layers, options.scales
        vocab = options.vocab or round(FULL_VOCAB * layers / FULL_LAYERS / GROUP) * GROUP
        self.directory = converted(
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
        """Loaded with the budget, slots filled by some tokens; prefetches as the package does."""
        ram = int(self.options.share * self.nbytes)
        model = load_model(self.directory, PagingOptions(ram=ram, lookahead=True))
        flash = model.flash
        if len(flash.caches) < self.options.layers:
            raise RuntimeError("the budget holds every expert of some layers; take a smaller one")
        least = min(cache.slots.table.capacity for cache in flash.caches.values())
        if least < 2 * TOP_K:
            raise RuntimeError(f"only {least} slots a layer: few layers need a larger --share")
        self.prefetchers = [switch.prefetcher for switch in switches(model)]
        self.prefetch(model, LOOKAHEAD["expert"])
        slots = [cache.slots.table.capacity for cache in flash.caches.values()]
        print(
            f"  budget {ram / 1e9:.2f} GB of {self.nbytes / 1e9:.2f}: {min(slots)} to {max(slots)} "
            f"slots of {EXPERTS} experts a layer, {self.stride / 1e6:.2f} MB each"
        )
        warm([self.directory.rows.path])
        began = time.perf_counter()
        self.decode(self.take(self.options.warm), model)
        print(f"  {self.options.warm} tokens to fill slots, {time.perf_counter() - began:.0f} s")
        return model

    def prefetch(self, model: nn.Module, on: bool) -> None:
        """Prefetch or not, from now on."""
        for switch, prefetcher in zip(switches(model), self.prefetchers, strict=True):
            switch.prefetcher = prefetcher if on else None

    @property
    def caches(self) -> dict[int, RowCache]:
        return self.model.flash.caches

    def decode(self, tokens: np.ndarray, model: nn.Module | None = None) -> Seen:
        """Token by token, from an empty KV cache."""
        model = model or self.model
        seen = Seen(tokens=len(tokens))
        with recording(model.flash.caches, seen.reads):
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
            {i: copy.deepcopy(cache.slots.table) for i, cache in self.caches.items()},
            {i: copy.deepcopy(cache.slots.policy) for i, cache in self.caches.items()},
        )

    def settle(self) -> None:
        """Wait for what was prefetched."""
        for cache in self.caches.values():
            early = cache.reads.early
            self.model.flash.reader.wait([f for reads in early.values() for f in reads])
            early.clear()
            cache._prefetched = None

    def restore(self, state: State, read: bool = True) -> None:
        """Put that state back; ``read`` what the slots do not hold any more."""
        self.settle()
        for i, cache in self.caches.items():
            table = copy.deepcopy(state.tables[i])
            slots = np.flatnonzero((table.row_in >= 0) & (table.row_in != cache.slots.table.row_in))
            slots = slots[np.argsort(table.row_in[slots])]
            if read and slots.size:
                reader, views = self.model.flash.reader, cache.slots.memory.views
                mx.eval(cache.slots._retained)
                reader.read(i, table.row_in[slots], slots, views)
            cache.slots.table, cache.slots.policy = table, copy.deepcopy(state.policies[i])

    def replay(self, reads: list[tuple[int, np.ndarray, np.ndarray]], reader: RowReader) -> float:
        """Seconds for a run's reads alone, into the slots that they were for."""
        caches = self.caches
        began = time.perf_counter()
        for layer, rows, slots in reads:
            reader.read(layer, rows, slots, caches[layer].slots.memory.views)
        return time.perf_counter() - began

    def compute(self, tokens: np.ndarray, before: State) -> Seen:
        """The same tokens when nothing is read; slots then hold what they held."""
        after = self.state()
        self.restore(before, read=False)
        real = self.model.flash.reader
        for cache in self.caches.values():
            cache.reads.reader = NoReads()
        try:
            return self.decode(tokens)
        finally:
            for cache in self.caches.values():
                cache.reads.reader = real
                cache.reads.early.clear()
            self.restore(after, read=False)


def switches(model: nn.Module) -> list[FlashSwitch]:
    """The paged experts of each layer."""
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
def recording(caches: dict[int, RowCache], reads: list) -> Iterator[None]:
    """Keep what the caches read."""
    real = {i: cache.reads.reader for i, cache in caches.items()}
    for i, cache in caches.items():
        cache.reads.reader = Recording(real[i], reads)
    try:
        yield
    finally:
        for i, cache in caches.items():
            cache.reads.reader = real[i]

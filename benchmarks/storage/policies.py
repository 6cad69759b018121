"""Cache policies against the optimum: their hits over those of a cache that knows the future.

Which rows fire is recorded from real forward passes: the two trained models of tests/fixtures and
SmolLM2, with the adapter that ships and with its small activations dropped, over a novel that none
of the fixtures has seen and over text that the model generates itself. The traces are then replayed
through the package's own slot table, without weights or disk. A hit is an active row that is in a
slot when its token comes; hits count after a warm start. The yardstick is Belady by the package's
rule: every active row takes a slot while there are enough. Besides: what it would give to let rows
that rank low pass by.

    python -m benchmarks.storage.policies                    # everything, some minutes
    python -m benchmarks.storage.policies --traces opt-austen --tokens 500
    python -m benchmarks.storage.policies --by-demand        # slots as ``load`` allots them

Knows: traces, policies, slot tables. Does not know: seconds or bytes (``staircase``).
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from datetime import date

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from benchmarks.support.converted import converted, smollm2
from benchmarks.support.machine import OUT, ROOT, machine_name
from mlx_flash.calibration import probes
from mlx_flash.calibration.text import DEFAULT as TEXT
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.paging.policies import LFU, LRU, Belady, Policy, SlidingWindow
from mlx_flash.paging.simulate import miss_counts
from mlx_flash.runtime.load import load_model, load_tokenizer
from mlx_flash.runtime.memory_requirements import PagingRequirements
from mlx_flash.runtime.options import PagingOptions

FIXTURES = ("opt-austen", "llama-relu-austen")
RELU = "relu-smollm2"  # the adapter that ships
TEXT_STARTS = 100_000  # characters into it: past the title page
SMOLLM_SPARSITY = (0.5, 0.9)
SMOLLM_LAYERS = slice(0, None, 6)
CONTEXT = 256  # tokens, what the fixtures are made for; one context follows the other
PROMPT = 16
WARM = 256  # tokens before hits count
SHARES = (0.1, 0.2, 0.3, 0.5)  # of the rows
DEMAND_TOKENS = 4
Trace = list[np.ndarray]  # of one layer, for each token its active rows
Rule = Callable[[int, Trace, int, Policy], int]

CANDIDATES: dict[str, Callable[[int], Policy]] = {
    **{f"window {n}": lambda rows, n=n: SlidingWindow(rows, n) for n in (1, 2, 3, 4, 5, 6, 8)},
    "lru (window without end)": LRU,
    "lru-2": lambda rows: LRU2(rows),
    **{f"lfu {n}": lambda rows, n=n: LFU(rows, n) for n in (8, 16, 32, 64, 128, 256, 1024)},
    "lrfu, 0.3 of 4 + 128": lambda rows: LRFU(rows, {4: 0.3, 128: 1}),
    "lrfu, 4 + 128": lambda rows: LRFU(rows, {4: 1, 128: 1}),
    "lrfu, 1 + 8 + 64 + 512": lambda rows: LRFU(rows, dict.fromkeys((1, 8, 64, 512), 1)),
}
PASSING = ("lru (window without end)", "lfu 32", "lfu 128", "lrfu, 0.3 of 4 + 128")


class LRU2(Policy):
    """The row whose use before the last is longest ago leaves first (LRU-K with K = 2)."""

    def __init__(self, rows: int) -> None:
        self._step = 0
        self._last, self._before = np.full(rows, -1), np.full(rows, -1)

    def used(self, rows: np.ndarray) -> None:
        self._step += 1
        self._before[rows] = self._last[rows]
        self._last[rows] = self._step

    def rank(self, rows: np.ndarray) -> np.ndarray:
        return self._before[rows] + self._last[rows] / (self._step + 1)  # the last use breaks ties


class LRFU(Policy):
    """Counts with several half-lives, weighted, as uses per step: recency and frequency."""

    def __init__(self, rows: int, weights: dict[float, float]) -> None:
        self._counts = [(LFU(rows, n), w * (1 - 2 ** (-1 / n))) for n, w in weights.items()]

    def used(self, rows: np.ndarray) -> None:
        for count, _ in self._counts:
            count.used(rows)

    def rank(self, rows: np.ndarray) -> np.ndarray:
        return sum(scale * count.rank(rows) for count, scale in self._counts)


def taking_slots(rows: int, trace: Trace, capacity: int, policy: Policy) -> int:
    """Hits by the package's rule: every active row takes a slot while there are enough."""
    uses = sum(active.size for active in trace[WARM:])
    return uses - int(miss_counts(trace, rows, capacity, policy)[WARM:].sum())


def passing_by(rows: int, trace: Trace, capacity: int, policy: Policy) -> int:
    """Hits if slots keep what ranks highest; other active rows are used and let go at once."""
    cached = np.zeros(rows, bool)
    hits = []
    for active in trace:
        hits.append(int(cached[active].sum()))
        policy.used(active)
        cached[active] = True
        found = np.flatnonzero(cached)
        if (excess := found.size - capacity) > 0:
            rank = np.asarray(policy.rank(found))
            cached[found[np.argpartition(rank, excess - 1)[:excess]]] = False
    return sum(hits[WARM:])


class Recorder:
    """Which rows fire, for ``evaluate.watch``; with ``cuts`` small activations are dropped."""

    def __init__(self, directory: ModelDirectory) -> None:
        self.activation = families.gate_function(directory.ffn)
        self.layers: list[list[np.ndarray]] = [[] for _ in directory.rows.layers]
        self.cuts: list[float] | None = None
        self.scores: list[list[np.ndarray]] | None = None

    def __call__(self, seen: probes.Seen) -> mx.array:
        scores = mx.abs(self.activation(seen.gate)).astype(mx.float32)
        if self.scores is not None:
            self.scores[seen.layer].append(np.array(scores[0]))
            return seen.h
        active = scores > (self.cuts[seen.layer] if self.cuts else 0)
        self.layers[seen.layer].append(np.packbits(np.array(active[0]), axis=1))
        return mx.where(active, seen.h, mx.zeros_like(seen.h))

    def find_cuts(self, model, tokens: np.ndarray, sparsity: float) -> None:
        """Each layer's threshold: the quantile of its activations over these tokens."""
        self.scores = [[] for _ in self.layers]
        probes.run(model, tokens, CONTEXT // 4)
        scores, self.scores = self.scores, None
        self.cuts = [float(np.quantile(np.concatenate(s), sparsity)) for s in scores]


def record(directory: ModelDirectory, sequences: list[np.ndarray], sparsity: float = 0) -> list:
    """For each layer bits [tokens, rows / 8]; the first sequence sets thresholds, if any."""
    model = load_model(directory, PagingOptions(kept_share=1.0))
    recorder = Recorder(directory)
    probes.watch(model, directory.ffn, recorder)
    if sparsity:
        recorder.find_cuts(model, sequences[0], sparsity)
    for tokens in sequences[1:]:
        probes.run(model, tokens, CONTEXT // 4)
    model.flash.close()
    return [np.concatenate(layer) for layer in recorder.layers]


def generated(directory: ModelDirectory, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """What the model makes of each sequence's first tokens, sampled at temperature 0.8."""
    model = load_model(directory, PagingOptions(kept_share=1.0))
    found = []
    for seed, tokens in enumerate(sequences):
        mx.random.seed(seed)
        prompt, count = tokens[:PROMPT], len(tokens) - PROMPT
        steps = generate_step(
            mx.array(prompt), model, max_tokens=count, sampler=make_sampler(temp=0.8)
        )
        found.append(np.array([*prompt, *(token for token, _ in steps)], np.int32))
    model.flash.close()
    return found


def directories() -> Iterator[tuple[str, Callable[[], ModelDirectory], float]]:
    """For each model its name, what makes it, and the share of activations that are dropped."""
    for fixture in FIXTURES:
        source = ROOT / "tests" / "fixtures" / fixture
        name = f"{fixture}-{zlib.crc32((source / 'model.safetensors').read_bytes()):08x}"
        yield name, lambda s=source, n=name: converted(f"{n}-float32", s, dtype="float32"), 0
    yield RELU, lambda: smollm2("float32", RELU), 0
    for sparsity in SMOLLM_SPARSITY:
        name = f"smollm2-{sparsity:.0%}-dropped"
        yield name, lambda: smollm2("float32"), sparsity


def traces(name: str, make: Callable[[], ModelDirectory], sparsity: float, tokens: int) -> dict:
    """Label -> (rows, one trace per layer); kept in OUT, since recording takes a while."""
    found = {}
    for kind in ("text",) if sparsity else ("text", "generated"):
        path = OUT / f"trace-{name}-{kind}-{tokens}.npz"
        if not path.exists():
            directory = make()
            text = TEXT.read_text()[TEXT_STARTS : TEXT_STARTS + 10 * (tokens + 2 * CONTEXT)]
            ids = load_tokenizer(directory).encode(text, add_special_tokens=False, verbose=False)
            ids = np.array(ids[: -(-tokens // CONTEXT) * CONTEXT + CONTEXT], np.int32)
            sequences = [ids[at : at + CONTEXT] for at in range(0, ids.size, CONTEXT)]
            if kind == "generated":
                sequences = generated(directory, sequences)
            some = SMOLLM_LAYERS if sparsity or name == RELU else slice(None)
            layers = record(directory, sequences, sparsity)[some]
            np.savez(path, *layers, rows=directory.rows.layers[0].rows)
        with np.load(path) as file:
            rows = int(file["rows"])
            layers = [file[n][:tokens] for n in file.files if n != "rows"]
        active = [np.unpackbits(layer, axis=1, count=rows) for layer in layers]
        found[f"{name}, {kind}"] = (rows, [[np.flatnonzero(t) for t in layer] for layer in active])
    return found


def capacities(rows: int, layers: list[Trace], share: float, by_demand: bool) -> list[int]:
    """Slots of each layer: equal ones, or as the rows that a few tokens in a row use."""
    if not by_demand:
        return [max(1, round(share * rows))] * len(layers)
    spans = range(0, len(layers[0]) - DEMAND_TOKENS + 1, DEMAND_TOKENS)
    demand = [
        np.mean([np.unique(np.concatenate(t[at : at + DEMAND_TOKENS])).size for at in spans])
        for t in layers
    ]
    count = len(layers)
    needs = PagingRequirements((0,) * count, (1,) * count, (rows,) * count, tuple(demand), 0)
    return list(needs.capacities(round(share * rows * count)))


def measure(rows: int, layers: list[Trace], by_demand: bool) -> dict:
    """Hits of everything at every share, summed over the layers."""
    slots = {share: capacities(rows, layers, share, by_demand) for share in SHARES}
    uses = sum(active.size for trace in layers for active in trace[WARM:])
    tokens = sum(len(trace) - WARM for trace in layers)

    def total(rule: Rule, make: Callable[[Trace], Policy]) -> np.ndarray:
        return np.array(
            [
                sum(rule(rows, t, n, make(t)) for t, n in zip(layers, slots[share], strict=True))
                for share in SHARES
            ]
        )

    def future(trace: Trace) -> Policy:
        return Belady(rows, trace)

    belady, best = total(taking_slots, future), total(passing_by, future)
    full = [
        np.mean([a.size > n for t, n in zip(layers, slots[s], strict=True) for a in t])
        for s in SHARES
    ]
    found: dict = {
        "yardsticks": {
            "active share of the rows": [uses / tokens / rows] * len(SHARES),
            "tokens with more than the slots": full,
            "belady, hits / uses": belady / uses,
            "optimum, rows passing by, hits / uses": best / uses,
        },
        "hits / belady": {},
        "hits / belady, rows passing by": {},
    }
    for label, make in CANDIDATES.items():
        hits = total(taking_slots, lambda _, m=make: m(rows))
        found["hits / belady"][label] = hits / belady
    for label in PASSING:
        hits = total(passing_by, lambda _, m=CANDIDATES[label]: m(rows))
        found["hits / belady, rows passing by"][label] = hits / belady
    return {
        group: {label: [float(n) for n in numbers] for label, numbers in lines.items()}
        for group, lines in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", help="comma-separated beginnings of names: opt-austen, smollm2")
    parser.add_argument("--tokens", type=int, default=768, help="the warm start included")
    parser.add_argument("--by-demand", action="store_true", help="layers get what they use")
    options = parser.parse_args()
    wanted = tuple((options.traces or "").split(","))
    OUT.mkdir(exist_ok=True)
    results: dict = {"machine": machine_name(), "date": date.today().isoformat()}
    print(
        f"{results['machine']}, {results['date']}; {options.tokens} tokens, {WARM} of them warm-up"
    )
    print("shares of the rows that have slots: " + ", ".join(f"{s:.0%}" for s in SHARES))
    for name, make, sparsity in directories():
        if not name.startswith(wanted):
            continue
        for label, (rows, layers) in traces(name, make, sparsity, options.tokens).items():
            results[label] = measure(rows, layers, options.by_demand)
            print(f"\n{label}: {len(layers)} layers of {rows} rows", flush=True)
            for group, lines in results[label].items():
                print(f"  {group}")
                for line, numbers in lines.items():
                    print(f"    {line:<38}", *(f"{n:6.3f}" for n in numbers), flush=True)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()

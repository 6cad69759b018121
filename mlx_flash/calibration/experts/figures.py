"""Figures of how a mixture's layers use their experts, and ways to share slots out by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_flash.paging.policies import DEFAULT_POLICY, DEFAULT_WINDOW, LRU, Belady, make_policy
from mlx_flash.runtime.memory_requirements import PagingRequirements

from .stack_distance import Trace, depths, misses, within

WINDOWS = tuple(range(1, 9))  # tokens in a row
DEMAND_TOKENS = "4"  # tokens in a row whose experts the split "distinct" goes by
TOP_SHARE = 0.25  # the most used experts, as a share of a layer's
CAPACITIES = (1 / 8, 1 / 4, 1 / 2)  # slots at which policies are compared, as a share of experts
BUDGETS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # at which splits are compared, as a share of all bytes
WARM = 256  # tokens before misses count; at most a quarter of the trace
SPLITS = ("equal", "distinct", "measured")


@dataclass(frozen=True)
class Asked:
    """Experts that tokens of some sequences were routed to in one layer.

    Args:
        experts: number of experts of the layer.
        chosen: expert numbers [sequences, tokens, experts per token].
        foretold: expert numbers of the same shape, that the layer's router would have chosen one
            layer earlier; None where that cannot be asked.
    """

    experts: int
    chosen: np.ndarray
    foretold: np.ndarray | None = None

    def trace(self) -> list[np.ndarray]:
        """Experts of each token, sorted and distinct."""
        return [np.unique(token) for token in self.chosen.reshape(-1, self.chosen.shape[-1])]

    def active(self) -> np.ndarray:
        """Experts of each token as bool [sequences, tokens, experts]."""
        found = np.zeros((*self.chosen.shape[:2], self.experts), bool)
        np.put_along_axis(found, self.chosen.astype(np.int64), True, axis=2)
        return found


def distinct(active: np.ndarray, windows: Sequence[int] = WINDOWS) -> dict[str, float]:
    """Mean number of distinct experts in n consecutive tokens of a sequence, by n as text."""
    found = {}
    tokens = active.shape[1]
    for window in (n for n in windows if n <= tokens):
        joined = active[:, : tokens - window + 1].copy()
        for ahead in range(1, window):
            joined |= active[:, ahead : tokens - window + 1 + ahead]
        found[str(window)] = float(joined.sum() / joined[..., 0].size)
    return found


def top_share(active: np.ndarray, share: float = TOP_SHARE) -> float:
    """Share of all uses that go to the most used experts.

    Args:
        active: see ``Asked.active``.
        share: of the experts that count as the most used.
    """
    counts = np.sort(active.reshape(-1, active.shape[-1]).sum(axis=0))[::-1]
    return float(counts[: math.ceil(counts.size * share)].sum() / max(1, counts.sum()))


def foretold_share(asked: Asked) -> float | None:
    """Share of the experts used that were foretold; None where nothing foretells the layer."""
    if asked.foretold is None:
        return None
    guessed = Asked(asked.experts, asked.foretold).active()
    active = asked.active()
    return float((active & guessed).sum() / max(1, active.sum()))


def curve(trace: Trace, experts: int, warm: int | None = None) -> np.ndarray:
    """Misses per token with 0, 1, ... ``experts`` slots under the default policy.

    Args:
        warm: tokens that fill the slots before misses count; None for a default.
    """
    warm = min(WARM, len(trace) // 4) if warm is None else warm
    policy = make_policy(DEFAULT_POLICY, experts)
    return misses(depths(trace, experts, policy)[warm:], experts)


def layer_figures(asked: Asked) -> dict[str, Any]:
    """Figures of one layer, ready for JSON."""
    trace, active, experts = asked.trace(), asked.active(), asked.experts
    slots = [max(1, round(share * experts)) for share in CAPACITIES]
    warm = min(WARM, len(trace) // 4)
    lru = depths(trace, experts, LRU(experts))
    found = {
        "lfu": depths(trace, experts, make_policy("lfu", experts)),
        "lru": lru,
        "window": within(lru, trace, DEFAULT_WINDOW),
        "belady": depths(trace, experts, Belady(experts, trace)),
    }
    uses = sum(step.size for step in trace[warm:])
    hits = {
        name: [int((np.concatenate(depth[warm:]) <= n).sum()) for n in slots]
        for name, depth in found.items()
    }
    return {
        "experts": experts,
        "per_token": float(active.sum() / active[..., 0].size),
        "asked_for": int(active.any(axis=(0, 1)).sum()),
        "top_share": top_share(active),
        "distinct": distinct(active),
        "foretold": foretold_share(asked),
        "slots": slots,
        "belady_hits": [n / uses for n in hits["belady"]],
        "hits_over_belady": {
            name: [n / max(1, best) for n, best in zip(hits[name], hits["belady"], strict=True)]
            for name in ("lfu", "lru", "window")
        },
        "misses": [round(float(n), 4) for n in misses(found["lfu"][warm:], experts)],
    }


def capacities(
    split: str, layers: Sequence[dict[str, Any]], needs: PagingRequirements, room: int
) -> tuple[int, ...]:
    """Slots of each layer by one of ``SPLITS``.

    Args:
        layers: from ``layer_figures``.
        room: bytes of all slots together.
    """
    if split == "measured":
        curves = tuple(tuple(layer["misses"]) for layer in layers)
        return replace(needs, curves=curves).capacities(room)
    demand = needs.rows
    if split == "distinct":
        demand = tuple(layer["distinct"][DEMAND_TOKENS] for layer in layers)
    return replace(needs, demand=demand, curves=None).capacities(room)


def compare_splits(
    layers: Sequence[dict[str, Any]], needs: PagingRequirements, curves: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Misses per token of every way to share slots out, on text that no way was made from.

    Args:
        layers: figures of the text that the splits are made from.
        curves: of each layer, misses per token on the other text, from ``curve``.

    Returns:
        ``shares``: budgets, see ``BUDGETS``; ``misses``: split -> misses at each of them.
    """
    total = needs.bytes_of(needs.rows)
    least = needs.bytes_of(needs.least_slots)
    found: dict[str, list[float]] = {split: [] for split in SPLITS}
    for share in BUDGETS:
        room = max(least, round(share * total))
        for split in SPLITS:
            slots = capacities(split, layers, needs, room)
            found[split].append(float(sum(c[n] for c, n in zip(curves, slots, strict=True))))
    return {"shares": list(BUDGETS), "misses": found}

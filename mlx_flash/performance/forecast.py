"""What a token will take under a plan: bytes, milliseconds, and what of them overlaps.

Arithmetic on what was measured: the disk's figures (``disk_speed``), what a token took in each way
of running the model, and which rows it needs (``trial``, in the types below). Reading and computing
are added up, less the share of the shorter of the two that the trial run hid behind the other.

Knows: plans and measured figures. Does not know: files, MLX, how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_flash.paging.policies import make_policy
from mlx_flash.paging.simulate import miss_counts
from mlx_flash.runtime.memory_plan import Plan

from .disk_speed import DiskSpeed
from .row_trace import RowUse

COUNTED = 64  # tokens at the end of a trace whose misses count


@dataclass(frozen=True)
class Timing:
    """What a token took, decoded one way; seconds.

    Args:
        ram: budget that it was run under.
        tokens: that were timed.
        compute: all that is not waiting for reads; the median.
        per_request: of it, what each request costs the processor; 0 where that was not to be told.
        wait, read: waiting for reads; time during which any was under way.
        nbytes, requests: of reading.
        rate: reading, over what the disk's speed alone would have it take.
        size: bytes, over what the disk's figures would have it be.
    """

    ram: int
    tokens: int
    compute: float
    wait: float = 0.0
    read: float = 0.0
    nbytes: float = 0.0
    requests: float = 0.0
    rate: float = 1.0
    size: float = 1.0
    per_request: float = 0.0

    @property
    def overlap(self) -> float:
        """Share of what reading could have hidden behind computing, or the reverse, that it did."""
        most = min(self.read, self.compute)
        return max(-1.0, min(1.0, (self.read - self.wait) / most)) if most > 0 else 0.0


@dataclass
class TrialRun:
    """All that was tried.

    Args:
        ways: "streamed", "paged", "resident" -> figures; those that a budget had room for.
        use: which rows each token of a text needed; None where nothing chooses rows.
        measured: when.
    """

    ways: dict[str, Timing] = field(default_factory=dict)
    use: RowUse | None = None
    measured: str = ""


@dataclass(frozen=True)
class Layers:
    """Sizes of a model's layers in the row file.

    Args:
        rows: of each.
        stored: bytes of each.
    """

    rows: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True)
class Forecast:
    """Of one decoded token; seconds.

    Args:
        nbytes, requests: read from flash.
        read: time that reading takes.
        compute: all else.
        hidden: of both, what runs at the same time.
        wanted, missing: rows that a token needs, and those of them that are read.
    """

    nbytes: float
    requests: float
    read: float
    compute: float
    hidden: float
    wanted: float
    missing: float

    @property
    def seconds(self) -> float:
        """Of a token."""
        return self.read + self.compute - self.hidden

    @property
    def hit_rate(self) -> float:
        """Share of the rows needed that are in memory."""
        return 1 - self.missing / self.wanted if self.wanted else 1.0

    def to_json(self) -> dict[str, Any]:
        """For people's programs."""
        return {
            "bytes_per_token": self.nbytes,
            "requests_per_token": self.requests,
            "read_ms": 1e3 * self.read,
            "compute_ms": 1e3 * self.compute,
            "overlapped_ms": 1e3 * self.hidden,
            "ms_per_token": 1e3 * self.seconds,
            "tokens_per_second": 1 / self.seconds if self.seconds > 0 else None,
            "hit_rate": self.hit_rate,
        }


def forecast(
    plan: Plan,
    layers: Layers,
    disk: DiskSpeed,
    trial: TrialRun,
    policy: str,
    *,
    warm: int | None = None,
    count: int = COUNTED,
    curves: Sequence[Sequence[float]] | None = None,
) -> Forecast:
    """The forecast for a plan.

    Args:
        policy: which rows leave the slots, see ``make_policy``.
        warm: tokens decoded before, which the slots still hold rows of; None for as many as the
            trace has.
        count: tokens decoded then.
        curves: of each layer, misses per token by number of slots, where they were measured on
            more text than the trial run's.
    """
    total = sum(layers.rows)
    if plan.slots:
        way = trial.ways["paged"]
        read, nbytes, requests, missing = _paged(
            plan, disk, way, trial, policy, warm, count, curves
        )
        wanted = sum(trial.use.per_token(i) for i in plan.slots) if trial.use else missing
        paged = sum(layers.rows[i] for i in plan.slots) / total
        wanted += sum(layers.rows[i] for i in plan.kept)
        missing = min(missing, wanted)
    elif plan.streamed:
        way = trial.ways["streamed"]
        nbytes = float(sum(layers.stored[i] for i in plan.streamed)) * way.size
        requests = way.requests * nbytes / way.nbytes if way.nbytes else 0.0
        read = way.rate * nbytes / disk.sequential
        missing = float(sum(layers.rows[i] for i in plan.streamed))
        wanted, paged = float(total), missing / total
    else:
        way, read, nbytes, requests, missing = _resident(trial), 0.0, 0.0, 0.0, 0.0
        wanted, paged = float(total), 0.0
    base = way.compute - way.per_request * way.requests
    compute = paged * base + (1 - paged) * _resident(trial).compute
    compute += way.per_request * requests
    hidden = way.overlap * min(read, compute)
    return Forecast(nbytes, requests, read, compute, hidden, wanted, missing)


def _resident(trial: TrialRun) -> Timing:
    """The nearest to a layer that is kept: computed whole, by mlx-lm's own module."""
    ways = trial.ways
    return ways.get("resident") or ways.get("streamed") or ways["paged"]


def _paged(
    plan: Plan,
    disk: DiskSpeed,
    way: Timing,
    trial: TrialRun,
    policy: str,
    warm: int | None,
    count: int,
    curves: Sequence[Sequence[float]] | None,
) -> tuple[float, float, float, float]:
    """(seconds of reading, bytes, requests, missing rows) of a token, all layers together."""
    use = trial.use
    read = nbytes = requests = missing = 0.0
    for layer, slots in plan.slots.items():
        if curves is not None:
            lacking = np.array([curves[layer][min(slots, len(curves[layer]) - 1)]])
        elif use is not None:
            count = min(count, use.tokens)
            stop = use.tokens if warm is None else min(use.tokens, warm + count)
            steps = use.steps(layer, range(stop))
            rule = make_policy(policy, use.rows[layer])
            lacking = miss_counts(steps, use.rows[layer], slots, rule)[-count:]
        else:
            raise ValueError("a plan with slots needs a trace of the rows that tokens need")
        read += float(np.mean([disk.time(n) for n in lacking]))
        nbytes += float(np.mean([disk.bytes_for(n) for n in lacking]))
        requests += float(np.mean([disk.requests_for(n) for n in lacking]))
        missing += float(np.mean(lacking))
    return way.rate * read, way.size * nbytes, way.size * requests, missing

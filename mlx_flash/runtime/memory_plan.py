"""From one RAM figure to a plan: what is resident, which FFN rows are kept, how long a chunk is.

The figure bounds the whole process: interpreter and libraries, resident weights, KV cache for the
context asked for, buffers, working memory. What is left holds FFN rows. Loading, ``plan``,
``inspect``, ``bench`` and the trial run all ask ``plan_for`` and ``least_budget``; there is no
second decision anywhere.

Knows: arithmetic. Does not know: models, files, or how much anything really takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_flash.common.sizes import show, with_margin
from mlx_flash.errors import BudgetError

from .memory_requirements import MemoryRequirements, PagingRequirements
from .options import PagingOptions

STEP_SHARE = 4  # prompt chunks get at most 1/4 of what the fixed needs leave

Kind = Literal[
    "process",
    "resident",
    "kv_cache",
    "workspace",
    "reader",
    "kept_rows",
    "streaming_buffers",
    "predictors",
    "cached_rows",
    "row_buffers",
    "slack",
]
Way = Literal["streamed", "paged", "resident"]


@dataclass(frozen=True)
class BudgetLine:
    """One use of memory.

    Args:
        kind: what it is, for programs.
        bytes: that it takes.
        label: what it is, for people; nothing is decided by it.
    """

    kind: Kind
    bytes: int
    label: str


@dataclass(frozen=True)
class Plan:
    """What a budget buys.

    Args:
        ram: the budget in bytes; None for a plan that no budget limits.
        kept: layers all of whose rows stay in memory.
        streamed: layers that are read whole for every token.
        step: tokens of a prompt chunk.
        lines: every use of memory, in the order in which to show them.
        slots: layer to number of cached rows, for layers of which single rows are read.
        lookup: the embedding stays on flash, where it can.
    """

    ram: int | None
    kept: tuple[int, ...]
    streamed: tuple[int, ...]
    step: int
    lines: tuple[BudgetLine, ...] = ()
    slots: dict[int, int] = field(default_factory=dict)
    lookup: bool = False

    @property
    def total(self) -> int:
        """Bytes of all lines."""
        return sum(line.bytes for line in self.lines)

    def bytes_of(self, kind: Kind) -> int:
        """Bytes of the lines of one kind; 0 where there are none."""
        return sum(line.bytes for line in self.lines if line.kind == kind)

    def to_json(self) -> dict[str, int]:
        """Label to bytes, for people and their programs."""
        return {line.label: line.bytes for line in self.lines}

    def replace(self, **changes: Any) -> Plan:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


def plan_for(needs: MemoryRequirements, options: PagingOptions, machine: int) -> Plan:
    """The plan that makes the most of a budget.

    Args:
        options: their ``ram`` is the budget; None stands for three quarters of the machine's
            memory. Shares for experiments are taken as they are, whatever the budget.
        machine: bytes of physical memory.

    Raises:
        BudgetError: more than the machine has; less than the least, which it lists; or a share
            that this model has no use for.
    """
    _check_shares(needs, options)
    ram = machine * 3 // 4 if options.ram is None else options.ram
    if options.cache_share is not None and needs.paging:
        rows = needs.paging.rows
        slots = [max(1, round(options.cache_share * count)) for count in rows]
        return _paged(None, needs, needs.paging, slots, needs.max_step)
    if ram > machine:
        raise BudgetError(
            f"RAM budget {show(ram)} is larger than the machine's memory, {show(machine)}"
        )
    if options.kept_share is not None:
        count = len(needs.layers)
        kept, streamed = split(count, count - round(options.kept_share * count))
        return _by_layers(ram, needs, kept, streamed, needs.max_step)
    if not options.use_flash and options.ram is None:  # nothing is limited, so chunks are not
        return _by_layers(ram, needs, range(len(needs.layers)), (), needs.max_step)
    _check_least(ram, needs, options)
    plans = dict(_least_plans(needs, options))
    if ram < needs.dense and needs.paging and "paged" in plans and ram >= plans["paged"].total:
        return _plan_rows(ram, needs, needs.paging, plans["paged"])
    return _plan_layers(ram, needs)


def least_budget(needs: MemoryRequirements, options: PagingOptions) -> int:
    """Bytes of the smallest budget that ``plan_for`` has a plan for.

    Raises:
        BudgetError: a share that this model has no use for.
    """
    _check_shares(needs, options)
    if options.kept_share is not None or options.cache_share is not None:
        return plan_for(needs, options.replace(ram=None), 1 << 62).total
    return min(plan.total for _, plan in _least_plans(needs, options))


def way_budgets(needs: MemoryRequirements) -> dict[Way, int]:
    """Each way in which the model can be run -> bytes of the smallest budget for it."""
    return {way: plan.total for way, plan in _least_plans(needs, PagingOptions())}


def _check_shares(needs: MemoryRequirements, options: PagingOptions) -> None:
    if options.kept_share is not None and needs.paging and needs.paging.experts:
        raise BudgetError("kept_share is for models without experts; give cache_share")
    if options.cache_share is not None and needs.paging is None:
        raise BudgetError(
            "cache_share is for models whose rows are predicted, or are experts; this one is read "
            f"a layer at a time with predictor {options.predictor!r}; give kept_share instead"
        )


def _least_plans(needs: MemoryRequirements, options: PagingOptions) -> Iterator[tuple[Way, Plan]]:
    """The ways to run a model that the options allow, each with its smallest plan.

    Experts are not streamed a layer at a time. Nor are layers where predictors were asked for by
    name: their rows are read as they fire, or all of them are kept.
    """
    paging = needs.paging if options.use_flash else None
    everything = range(len(needs.layers))
    if options.use_flash and (paging is None or paging.streams_too(options.predictor)):
        if needs.small:
            yield "streamed", _by_layers(None, needs, everything, (), needs.min_step)
        else:
            yield "streamed", _by_layers(None, needs, (), everything, needs.min_step)
    if paging:
        yield "paged", _paged(None, needs, paging, paging.least_slots, needs.min_step)
    yield "resident", _by_layers(None, needs, everything, (), needs.resident_step)


def _check_least(ram: int, needs: MemoryRequirements, options: PagingOptions) -> None:
    """Raise BudgetError for a budget below the least, with all that the least is made of."""
    ways = dict(_least_plans(needs, options))
    least = min(ways.values(), key=lambda plan: plan.total)
    if ram >= least.total:
        return
    if not options.use_flash:
        raise BudgetError(
            f"the dense model needs {show(least.total)}, the RAM budget is {show(ram)}; "
            "run it without --dense, or with a larger budget"
        )
    listed = "\n".join(f"  {line.bytes / 1e6:10.1f} MB  {line.label}" for line in least.lines)
    predictors = other = ""
    if least.bytes_of("predictors"):
        predictors = " with its predictors"
    if needs.paging and not needs.paging.experts and "streamed" not in ways:
        streamed = dict(_least_plans(needs, options.replace(predictor="auto")))["streamed"]
        other = f"; without predictors the least is {show(with_margin(streamed.total))}"
    raise BudgetError(
        f"RAM budget {show(ram)} is too small for this model{predictors}; the least that works "
        f"is {show(with_margin(least.total))}:\n{listed}\nA shorter context needs less{other}."
    )


def _plan_layers(ram: int, needs: MemoryRequirements) -> Plan:
    """As few layers streamed as possible, and of them the longest chunks that fit."""
    count = len(needs.layers)
    candidates = [0, *range(needs.buffers + 1, count + 1)]
    fits: Plan | None = None
    for streamed in candidates:
        kept, chosen = split(count, streamed)
        room = ram - needs.fixed - needs.reader
        room -= needs.buffers * needs.buffer if streamed else needs.lookup
        left = room - sum(needs.layers[i] for i in kept)
        wanted = _step(room // STEP_SHARE, needs) if streamed else needs.resident_step
        step = _step(left, needs)
        if not step:
            continue
        plan = _by_layers(ram, needs, kept, chosen, step)
        if step >= wanted or streamed == candidates[-1]:
            return plan
        fits = fits or plan
    if fits:  # with shorter prompt chunks than one would like
        return fits
    raise BudgetError(f"no plan fits {show(ram)}; report this with the output of mlx_flash inspect")


def _plan_rows(
    ram: int, needs: MemoryRequirements, paging: PagingRequirements, least: Plan
) -> Plan:
    """Beyond the least, a part for longer chunks and the rest for cached rows."""
    smallest = needs.workspace(needs.min_step)
    slots = paging.bytes_of(paging.least_slots)
    spare = ram - least.total
    share = (spare + slots + smallest) // STEP_SHARE
    step = _step(max(smallest, min(spare + smallest, share)), needs)
    spare -= needs.workspace(step) - smallest
    # A layer that is kept may take more than all its slots and its predictor do.
    for i in least.slots:
        whole = paging.rows[i] * paging.slots[i] + paging.predictors[i]
        spare -= max(0, needs.layers[i] - whole)
    return _paged(ram, needs, paging, paging.capacities(slots + spare), step)


def _by_layers(
    ram: int | None,
    needs: MemoryRequirements,
    kept: Sequence[int],
    streamed: Sequence[int],
    step: int,
) -> Plan:
    """The plan that keeps some layers and streams the others."""
    lines = _common_lines(needs, step, kept, lookup=bool(streamed))
    if streamed:
        size = needs.buffers * needs.buffer
        label = f"{needs.buffers} streaming buffers"
        lines.append(BudgetLine("streaming_buffers", size, label))
    lines.append(BudgetLine("slack", needs.slack, "slack"))
    return Plan(ram, tuple(kept), tuple(streamed), step, tuple(lines), lookup=bool(streamed))


def _paged(
    ram: int | None,
    needs: MemoryRequirements,
    paging: PagingRequirements,
    capacities: Sequence[int],
    step: int,
) -> Plan:
    """The plan that caches so many rows of each layer; a layer with all of them is kept."""
    kept = [i for i, n in enumerate(capacities) if n >= paging.rows[i]]
    slots = {i: n for i, n in enumerate(capacities) if n < paging.rows[i]}
    lines = _common_lines(needs, step, kept, lookup=True)
    if predictors := sum(paging.predictors[i] for i in slots):
        lines.append(BudgetLine("predictors", predictors, "predictors"))
    share = sum(slots.values()) / max(1, sum(paging.rows[i] for i in slots))
    unit = "experts" if paging.experts else "FFN rows"
    label = f"cached {unit}, {100 * share:.0f} % of {len(slots)} layers"
    cached = sum(n * paging.slots[i] for i, n in slots.items())
    lines.append(BudgetLine("cached_rows", cached, label))
    lines.append(BudgetLine("row_buffers", paging.buffers, "2 row buffers"))
    lines.append(BudgetLine("slack", needs.slack, "slack"))
    return Plan(ram, tuple(kept), (), step, tuple(lines), slots, lookup=True)


def _common_lines(
    needs: MemoryRequirements, step: int, kept: Sequence[int], lookup: bool
) -> list[BudgetLine]:
    """The lines that every plan begins with."""
    resident = needs.resident - (needs.lookup if lookup else 0)
    working = f"working memory for chunks of {step} tokens"
    lines = [
        BudgetLine("process", needs.process, "interpreter, libraries, tokenizer"),
        BudgetLine("resident", resident, "resident weights"),
        BudgetLine("kv_cache", needs.kv_cache, f"KV cache for {needs.context} tokens"),
        BudgetLine("workspace", needs.workspace(step), working),
        BudgetLine("reader", needs.reader, "row reader"),
    ]
    if kept:
        size = sum(needs.layers[i] for i in kept)
        label = f"FFN rows kept, {len(kept)} of {len(needs.layers)} layers"
        lines.append(BudgetLine("kept_rows", size, label))
    return lines


def spread(count: int, layers: int) -> tuple[int, ...]:
    """``count`` of ``layers`` layer numbers, evenly apart: reading goes on behind kept layers."""
    return tuple(int((2 * i + 1) * layers / (2 * count)) for i in range(count))


def split(layers: int, streamed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(kept, streamed) layer numbers where ``streamed`` of ``layers`` layers are streamed."""
    chosen = spread(streamed, layers)
    return tuple(i for i in range(layers) if i not in set(chosen)), chosen


def _step(room: int, needs: MemoryRequirements) -> int:
    """The longest prompt chunk whose working memory fits into ``room`` bytes, in tokens.

    A multiple of the shortest chunk, or the longest; 0 where none fits.
    """
    least = needs.min_step
    low, high = 0, -(-needs.max_step // least)
    while low < high:
        middle = (low + high + 1) // 2
        if needs.workspace(min(middle * least, needs.max_step)) <= room:
            low = middle
        else:
            high = middle - 1
    return min(low * least, needs.max_step)

"""One RAM figure to a plan: what is resident, what is kept of the FFN, how long a prompt chunk is.

The figure bounds the whole process: interpreter and libraries, resident weights, KV cache for the
context asked for, buffers, working memory. What is left holds FFN layers for good.

Knows: arithmetic. Does not know: models, files, or how much anything really takes; ``load``
measures or reads the sizes and hands them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_flash.common.sizes import show, with_margin
from mlx_flash.errors import BudgetError

from .slot_allocation import allocate_slots

MIN_STEP = 16
RESIDENT_STEP = 128
MAX_STEP = 2048  # mlx-lm's own prefill step
STEP_SHARE = 4  # of what fixed needs leave, at most one part in so many goes to prompt chunks
BUFFERS = 2
LEAST_SHARE = 50  # a cache holds at least one row in so many


@dataclass(frozen=True)
class MemoryRequirements:
    """Sizes in bytes of all that must be in memory.

    Args:
        process: interpreter, libraries, tokenizer: what is resident before the model is.
        resident: weights that always stay.
        kv_cache: for ``context`` tokens.
        context: tokens.
        reader: staging buffers of the row reader.
        slack: what allocators and late imports may add.
        layers: FFN weights of each layer, as kept for good.
        buffer: one streaming buffer.
        buffers: how many of them streaming takes.
        workspace: working memory of a prompt chunk of so many tokens.
        lookup: of ``resident`` an embedding that may stay on flash where layers do.
    """

    process: int
    resident: int
    kv_cache: int
    context: int
    reader: int
    slack: int
    layers: tuple[int, ...]
    buffer: int
    buffers: int
    workspace: Callable[[int], int]
    lookup: int = 0

    @property
    def fixed(self) -> int:
        """What it takes whatever is read from flash."""
        return self.process + self.resident - self.lookup + self.kv_cache + self.slack

    @property
    def dense(self) -> int:
        """What it takes to keep every row."""
        held = self.fixed + self.lookup + sum(self.layers)
        return held + self.reader + self.workspace(self.resident_step)

    @property
    def least(self) -> int:
        """The smallest budget that works."""
        rows = self.buffers * self.buffer
        if self.small:
            rows = sum(self.layers) + self.lookup
        return self.fixed + self.reader + rows + self.workspace(self.min_step)

    @property
    def small(self) -> bool:
        """Whether streaming buffers would take as much as all layers."""
        held = sum(self.layers) + self.lookup
        return len(self.layers) <= self.buffers or held <= self.buffers * self.buffer

    @property
    def max_step(self) -> int:
        return min(MAX_STEP, max(1, self.context))

    @property
    def min_step(self) -> int:
        return min(MIN_STEP, self.max_step)

    @property
    def resident_step(self) -> int:
        """Enough where nothing is streamed: a chunk costs no reading then."""
        return min(RESIDENT_STEP, self.max_step)

    def table(self, step: int, kept: Sequence[int] = (), lookup: bool = False) -> dict[str, int]:
        """Label to bytes, in the order in which to show them.

        Args:
            step: tokens of a prompt chunk.
            kept: layers that are kept; the others are streamed.
            lookup: the embedding stays on flash.
        """
        streams = len(kept) < len(self.layers)
        on_flash = self.lookup if lookup else 0
        rows = {
            "interpreter, libraries, tokenizer": self.process,
            "resident weights": self.resident - on_flash,
            f"KV cache for {self.context} tokens": self.kv_cache,
            f"working memory for chunks of {step} tokens": self.workspace(step),
            "row reader": self.reader,
        }
        if kept:
            rows[f"FFN rows kept, {len(kept)} of {len(self.layers)} layers"] = sum(
                self.layers[i] for i in kept
            )
        if streams:
            rows[f"{self.buffers} streaming buffers"] = self.buffers * self.buffer
        return {**rows, "slack": self.slack}


@dataclass(frozen=True)
class PagingRequirements:
    """What it takes to read only the rows that fire, in bytes where nothing else is said.

    Args:
        predictors: of each layer.
        slots: of each layer, memory that one cached row takes.
        rows: numbers of rows of each layer.
        demand: of each layer, how many rows it would have the cache hold; only the proportions
            count.
        buffers: for rows that find no slot, and for prompts.
        unit: what rows are called.
        curves: of each layer, misses per token with 0, 1, ... cached rows, as measured; where they
            are given slots go where they save most, and ``demand`` does not count.
    """

    predictors: tuple[int, ...]
    slots: tuple[int, ...]
    rows: tuple[int, ...]
    demand: tuple[float, ...]
    buffers: int
    unit: str = "FFN rows"
    curves: tuple[tuple[float, ...], ...] | None = None

    @property
    def least_slots(self) -> tuple[int, ...]:
        """Cached rows of each layer below which paging makes no sense."""
        return tuple(-(-rows // LEAST_SHARE) for rows in self.rows)

    def least(self, needs: MemoryRequirements) -> int:
        """The smallest budget that works."""
        return sparse_plan_of(None, needs, self, self.least_slots, needs.min_step).total

    def bytes_of(self, capacities: Sequence[int]) -> int:
        """Memory for so many cached rows of each layer."""
        return sum(n * size for n, size in zip(capacities, self.slots, strict=True))

    def capacities(self, room: int) -> tuple[int, ...]:
        """Cached rows of each layer that fit into ``room``.

        As measured curves make the most of them, else as demands are to each other.
        """
        if self.curves is not None:
            return allocate_slots(self.curves, self.slots, self.least_slots, room)
        low, high = 0.0, max(r / max(d, 1e-9) for r, d in zip(self.rows, self.demand, strict=True))
        for _ in range(64):
            middle = (low + high) / 2
            if self.bytes_of(self._at(middle)) <= room:
                low = middle
            else:
                high = middle
        return self._at(low)

    def _at(self, factor: float) -> tuple[int, ...]:
        return tuple(
            min(rows, max(least, int(factor * demand)))
            for rows, least, demand in zip(self.rows, self.least_slots, self.demand, strict=True)
        )


@dataclass(frozen=True)
class Plan:
    """What a budget buys.

    Args:
        ram: the budget.
        kept: layers all of whose rows stay in memory.
        streamed: layers that are read whole for every token.
        step: tokens of a prompt chunk.
        table: label to bytes.
        slots: layer to cached rows, for layers of which only the rows that fire are read.
        lookup: the embedding stays on flash, where it can.
    """

    ram: int | None
    kept: tuple[int, ...]
    streamed: tuple[int, ...]
    step: int
    table: dict[str, int]
    slots: dict[int, int] = field(default_factory=dict)
    lookup: bool = False

    @property
    def total(self) -> int:
        return sum(self.table.values())


def spread(count: int, layers: int) -> tuple[int, ...]:
    """``count`` of ``layers`` layer numbers, evenly apart: reading goes on behind kept layers."""
    return tuple(int((2 * i + 1) * layers / (2 * count)) for i in range(count))


def split(layers: int, streamed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(kept, streamed) layer numbers for so many streamed layers."""
    chosen = spread(streamed, layers)
    return tuple(i for i in range(layers) if i not in set(chosen)), chosen


def check_machine(ram: int, machine: int) -> None:
    """Raise BudgetError for a budget that the machine does not have."""
    if ram > machine:
        raise BudgetError(
            f"RAM budget {show(ram)} is larger than the machine's memory, {show(machine)}"
        )


def make_plan(ram: int, needs: MemoryRequirements, machine: int) -> Plan:
    """The plan that makes the most of ``ram`` bytes.

    Raises:
        BudgetError: more than the machine has, or less than the least; it lists what that is.
    """
    check_machine(ram, machine)
    if ram < needs.least:
        kept = range(len(needs.layers)) if needs.small else ()
        parts = needs.table(needs.min_step, kept, lookup=not needs.small)
        listed = "\n".join(f"  {size / 1e6:10.1f} MB  {label}" for label, size in parts.items())
        raise BudgetError(
            f"RAM budget {show(ram)} is too small for this model; the least that works is "
            f"{show(with_margin(needs.least))}:\n{listed}\nA shorter context needs less."
        )
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
        table = needs.table(step, kept, lookup=bool(streamed))
        plan = Plan(ram, kept, chosen, step, table, lookup=bool(streamed))
        if step >= wanted or streamed == candidates[-1]:
            return plan
        fits = fits or plan
    if fits:  # with shorter prompt chunks than one would like
        return fits
    raise BudgetError(f"no plan fits {show(ram)}, though {show(needs.least)} should do")


def make_sparse_plan(
    ram: int, needs: MemoryRequirements, sparse: PagingRequirements, machine: int
) -> Plan:
    """The plan that makes the most of ``ram`` bytes where rows are predicted.

    Raises:
        BudgetError: more than the machine has, or less than the least; it lists what that is.
    """
    check_machine(ram, machine)
    if needs.dense <= ram:
        return make_plan(ram, needs, machine)
    least = sparse_plan_of(ram, needs, sparse, sparse.least_slots, needs.min_step)
    if ram < least.total:
        listed = "\n".join(f"  {n / 1e6:10.1f} MB  {label}" for label, n in least.table.items())
        predictors = other = ""
        if any(sparse.predictors):
            predictors = " with its predictors"
            other = f"; without predictors the least is {show(with_margin(needs.least))}"
        raise BudgetError(
            f"RAM budget {show(ram)} is too small for this model{predictors}; the least "
            f"that works is {show(with_margin(least.total))}:\n{listed}\nA shorter context needs "
            f"less{other}."
        )
    smallest = needs.workspace(needs.min_step)
    room = ram - least.total + sparse.bytes_of(sparse.least_slots) + smallest
    step = _step(max(smallest, room // STEP_SHARE), needs)
    capacities = sparse.capacities(room - needs.workspace(step))
    return sparse_plan_of(ram, needs, sparse, capacities, step)


def sparse_plan_of(
    ram: int | None,
    needs: MemoryRequirements,
    sparse: PagingRequirements,
    capacities: Sequence[int],
    step: int,
) -> Plan:
    """The plan that has so many cached rows of each layer; a layer with all of them is kept."""
    kept = tuple(i for i, n in enumerate(capacities) if n >= sparse.rows[i])
    slots = {i: n for i, n in enumerate(capacities) if i not in kept}
    share = sum(slots.values()) / max(1, sum(sparse.rows[i] for i in slots))
    table = {
        label: size
        for label, size in needs.table(step, kept, lookup=True).items()
        if "streaming" not in label and label != "slack"
    }
    if predictors := sum(sparse.predictors[i] for i in slots):
        table["predictors"] = predictors
    table[f"cached {sparse.unit}, {100 * share:.0f} % of {len(slots)} layers"] = sum(
        n * sparse.slots[i] for i, n in slots.items()
    )
    table["2 row buffers"] = sparse.buffers
    return Plan(ram, kept, (), step, {**table, "slack": needs.slack}, slots, lookup=True)


def _step(room: int, needs: MemoryRequirements) -> int:
    """The longest prompt chunk whose memory fits, a multiple of the shortest; 0 where none does."""
    least = needs.min_step
    low, high = 0, -(-needs.max_step // least)
    while low < high:
        middle = (low + high + 1) // 2
        if needs.workspace(min(middle * least, needs.max_step)) <= room:
            low = middle
        else:
            high = middle - 1
    return min(low * least, needs.max_step)

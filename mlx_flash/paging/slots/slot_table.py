"""Which row is in which slot; numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mlx_flash.errors import CacheError

from ..policies import Policy


@dataclass
class Update:
    """What has to happen so that the active rows are in slots.

    First slots ``move_from`` are copied to ``move_to``, then row ``load_rows[i]`` is read into
    slot ``load_slots[i]``. ``load_rows`` is sorted.
    """

    load_rows: np.ndarray
    load_slots: np.ndarray
    move_from: np.ndarray
    move_to: np.ndarray
    hits: int

    @property
    def changes(self) -> bool:
        """Whether any slot is written to."""
        return bool(self.load_rows.size or self.move_to.size)


@dataclass
class SlotTable:
    """Which row is in which slot. Slots below ``num_used`` are in use, without holes.

    Args:
        rows: of the layer.
        capacity: slots, at least one.

    Attributes:
        slot_of: slot of each row, -1 for none, int32 [rows].
        row_in: row in each slot, -1 for none, int32 [capacity].
    """

    rows: int
    capacity: int
    num_used: int = 0
    slot_of: np.ndarray = field(init=False)
    row_in: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise CacheError(f"a cache needs at least one slot, got {self.capacity}")
        self.slot_of = np.full(self.rows, -1, np.int32)
        self.row_in = np.full(self.capacity, -1, np.int32)

    def admit(self, active: np.ndarray, policy: Policy) -> np.ndarray:
        """Tell the policy of a step, and choose which of its active rows get slots.

        All of them, unless they are more than slots: then those that are in slots already, and of
        the others those that the policy would let go last.

        Returns:
            bool [active rows].

        Raises:
            CacheError: see ``check``; nothing is changed then.
        """
        self.check(active)
        policy.used(active)
        if active.size <= self.capacity:
            return np.ones(active.size, bool)
        inside = self.slot_of[active] >= 0
        missing = np.flatnonzero(~inside)
        order = np.argsort(-np.asarray(policy.rank(active[missing])), kind="stable")
        inside[missing[order[: self.capacity - int(inside.sum())]]] = True
        return inside

    def update(self, active: np.ndarray, policy: Policy, told: bool = False) -> Update:
        """Give every active row (sorted, distinct) a slot; others leave where room is needed.

        Args:
            told: the policy has been told of this step, by ``admit``.

        Raises:
            CacheError: they are more than slots, or see ``check``; nothing is changed then.
        """
        self.check(active)
        if active.size > self.capacity:
            raise CacheError(
                f"{active.size} rows are active at once, the cache has {self.capacity} slots; "
                "give it more RAM or fetch in several rounds"
            )
        if not told:
            policy.used(active)
        missing = active[self.slot_of[active] < 0]
        holes = self._evict(active, missing.size, policy)
        filled = min(holes.size, missing.size)
        appended = np.arange(self.num_used, self.num_used + missing.size - filled, dtype=np.int32)
        slots = np.concatenate([holes[:filled], appended])
        self.num_used += appended.size
        move_from, move_to = self._close(holes[filled:])
        self.slot_of[missing] = slots
        self.row_in[slots] = missing
        return Update(missing, slots, move_from, move_to, int(active.size - missing.size))

    def check(self, active: np.ndarray) -> None:
        """Raise CacheError unless these are sorted, distinct row numbers of this layer, int [n]."""
        if active.ndim != 1 or active.dtype.kind not in "iu":
            raise CacheError(f"active rows must be ints, got {active.dtype} {active.shape}")
        if active.size and not (
            active[0] >= 0 and active[-1] < self.rows and bool((active[1:] > active[:-1]).all())
        ):
            raise CacheError(f"active rows must be sorted, distinct and below {self.rows}")

    def _evict(self, active: np.ndarray, wanted: int, policy: Policy) -> np.ndarray:
        """Free slots, in ascending order."""
        cached = self.row_in[: self.num_used]
        needed = self.slot_of[active]
        needed = needed[needed >= 0]
        leaving = np.zeros(cached.size, bool)
        if policy.is_window:
            leaving |= policy.expired(cached)
        leaving[needed] = False
        lacking = wanted - (self.capacity - self.num_used) - int(leaving.sum())
        if lacking > 0:
            staying = ~leaving
            staying[needed] = False
            others = np.flatnonzero(staying)
            rank = np.asarray(policy.rank(cached[others]))
            leaving[others[np.argpartition(rank, lacking - 1)[:lacking]]] = True
        holes = np.flatnonzero(leaving).astype(np.int32)
        self.slot_of[cached[holes]] = -1
        self.row_in[holes] = -1
        return holes

    def _close(self, holes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fill holes from the end of the prefix (the paper's deletion, O(holes))."""
        self.num_used -= holes.size
        targets = holes[holes < self.num_used]
        tail = np.arange(self.num_used, self.num_used + holes.size, dtype=np.int32)
        sources = tail[self.row_in[tail] >= 0]
        moved = self.row_in[sources]
        self.row_in[targets] = moved
        self.slot_of[moved] = targets
        self.row_in[tail] = -1
        return sources, targets

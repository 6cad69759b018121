"""How a model is to be run: every choice that loading, planning and benchmarks share.

The object is made once, by ``load`` or by the command line, and only it travels from there on.

Knows: which choices contradict each other, whatever the model. Does not know: models, files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import BudgetError, CacheError
from mlx_flash.paging.policies import DEFAULT_POLICY, DEFAULT_WINDOW, make_policy

from .kv_policy import DEFAULT_KV, check_kv


@dataclass(frozen=True)
class PagingOptions:
    """How a model is loaded; the defaults are those of ``mlx_flash.load``.

    Args:
        ram: bytes that the whole process may take; None takes up to three quarters of the
            machine's memory and limits nothing.
        context: tokens, prompt and generated, that the KV cache is planned for; None for 2048, or
            for what the model was made for if that is less.
        use_flash: False keeps every weight in memory.
        predictor: one of ``predictors.registry.names()``.
        policy: which rows leave the cache, as ``make_policy`` takes it: "lfu", "lru", "window",
            "window:8".
        lookahead: whether to read ahead for the next layer; None takes the unit's default.
        kv: how keys and values of past tokens are kept, as ``make_kv_policy`` takes it: "plain",
            "rotating:4096" (tokens), "quantized:8" (bits).
        kept_share: for experiments, the share of layers whose rows are all kept (0 to 1), instead
            of what the budget would buy; nothing is predicted then.
        cache_share: for experiments, the share of every layer's rows that the cache holds (above
            0, at most 1), instead of what the budget would buy.

    Raises:
        BudgetError: a size or a share out of range, or shares that contradict each other.
        CacheError: no such policy of either kind, or one that leaves no room to read ahead.
    """

    ram: int | None = None
    context: int | None = None
    use_flash: bool = True
    predictor: str = "auto"
    policy: str = DEFAULT_POLICY
    lookahead: bool | None = None
    kv: str = DEFAULT_KV
    kept_share: float | None = None
    cache_share: float | None = None

    def __post_init__(self) -> None:
        if self.ram is not None and parse_ram(self.ram) != self.ram:
            raise BudgetError(
                f"a RAM budget is a whole number of bytes here, got {self.ram!r}; parse_ram makes "
                "one of text"
            )
        if self.context is not None and self.context < 1:
            raise BudgetError(f"a context is at least one token, got {self.context}")
        policy = make_policy(self.policy, 1)
        check_kv(self.kv)
        if self.kept_share is not None and not 0 <= self.kept_share <= 1:
            raise BudgetError(f"kept_share is a share from 0 to 1, got {self.kept_share}")
        if self.cache_share is not None and not 0 < self.cache_share <= 1:
            raise BudgetError(f"cache_share is a share above 0, at most 1, got {self.cache_share}")
        self._check_shares()
        if self.lookahead and policy.is_window:
            raise CacheError(
                f"lookahead needs room in the cache that policy {self.policy!r} does not give; "
                "leave one of them out"
            )

    def _check_shares(self) -> None:
        given = [name for name in ("kept_share", "cache_share") if getattr(self, name) is not None]
        if len(given) > 1:
            raise BudgetError("kept_share keeps whole layers, so cache_share has no use; give one")
        if given and not self.use_flash:
            raise BudgetError(f"use_flash=False keeps every row, so {given[0]} has no use")

    @property
    def policy_name(self) -> str:
        """The policy without its parameter: "window" of "window:8"."""
        return self.policy.partition(":")[0]

    @property
    def window(self) -> int:
        """Tokens that the policy "window" keeps rows for, whichever policy is chosen."""
        _, _, number = self.policy.partition(":")
        return int(number) if number and self.policy_name == "window" else DEFAULT_WINDOW

    def replace(self, **changes: Any) -> PagingOptions:
        """A copy with other values, checked anew."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields; ``PagingOptions(**fields)`` makes the same object again."""
        return dataclasses.asdict(self)


def policy_spec(policy: str, window: int | None = None) -> str:
    """A policy's spec string from its name and, for "window", its number of tokens.

    Raises:
        CacheError: a window for a policy that has none, or for one that names its own.
    """
    if window is None:
        return policy
    if policy != "window":
        raise CacheError(f"window={window} is for policy 'window', and the policy is {policy!r}")
    return f"{policy}:{window}"

"""Prompt caches that callers keep between calls: a server's, a notebook's.

A budget is planned for one context of keys and values. A cache that was filled in an earlier call
and is still held takes its part of that, so its tokens count until it is let go.

Knows: mlx-lm's caches. Does not know: budgets.
"""

from __future__ import annotations

import weakref
from typing import Any

from .kv_policy import leaves, tokens_in


class RetainedCaches:
    """The caches that a model was called with and that are still alive."""

    def __init__(self) -> None:
        self._seen: dict[int, list[weakref.ref[Any]]] = {}  # by the first leaf's identity

    def note(self, cache: Any) -> None:
        """A call has filled a cache. Every token does, so one that is known is only looked at."""
        first = next(leaves(cache), None)
        if first is None:
            return
        known = self._seen.get(id(first))
        if known is None:
            weakref.finalize(first, self._seen.pop, id(first), None).atexit = False
        elif all(ref() is not None for ref in known):
            return
        self._seen[id(first)] = [weakref.ref(leaf) for leaf in leaves(cache)]

    def others(self, cache: Any) -> int:
        """Tokens in all noted caches but ``cache``, sequences of a batch added up."""
        if self._seen.keys() <= {id(next(leaves(cache), None))}:
            return 0
        own = {id(leaf) for leaf in leaves(cache)}
        alive = [refs for key, refs in list(self._seen.items()) if key not in own]
        return sum(_tokens_of(refs) for refs in alive)


def _tokens_of(refs: list[weakref.ref[Any]]) -> int:
    """Tokens in the leaf that has most of them: others may drop some, or count none."""
    return max((_tokens(leaf) for ref in refs if (leaf := ref()) is not None), default=0)


def _tokens(leaf: Any) -> int:
    keys = getattr(leaf, "keys", None)
    keys = keys[0] if isinstance(keys, tuple | list) and keys else keys  # quantised
    batch = keys.shape[0] if hasattr(keys, "shape") else 1
    return batch * tokens_in(leaf)

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
        self._seen: dict[int, weakref.ref[Any]] = {}

    def note(self, cache: Any) -> None:
        """A call has filled a cache."""
        found = list(leaves(cache))
        if not found:
            return
        key, leaf = id(found[0]), max(found, key=_tokens)
        if key not in self._seen:
            weakref.finalize(found[0], self._seen.pop, key, None).atexit = False
        self._seen[key] = weakref.ref(leaf)

    def others(self, cache: Any) -> int:
        """Tokens in all noted caches but ``cache``, sequences of a batch added up."""
        own = {id(leaf) for leaf in leaves(cache)}
        alive = [ref() for key, ref in list(self._seen.items()) if key not in own]
        return sum(_tokens(leaf) for leaf in alive if leaf is not None)


def _tokens(leaf: Any) -> int:
    keys = getattr(leaf, "keys", None)
    keys = keys[0] if isinstance(keys, tuple | list) and keys else keys  # quantised
    batch = keys.shape[0] if hasattr(keys, "shape") else 1
    return batch * tokens_in(leaf)

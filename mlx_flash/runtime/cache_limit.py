"""MLX's own buffer cache, kept small while a model with a RAM budget is loaded.

The limit is the process': it is set with the first such model and put back with the last, unless
somebody has set another one meanwhile.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import mlx.core as mx

MLX_CACHE = 8 << 20  # bytes that MLX may hold on to for reuse


class _Limit:
    """The process' limit, and how many models need it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a model may end, collected, while another one begins
        self._holders = 0
        self._before: int | None = None

    def change(self, holders: int) -> None:
        with self._lock:
            self._holders += holders
            if self._holders and self._before is None:
                self._before = mx.set_cache_limit(MLX_CACHE)
            elif not self._holders and self._before is not None:
                before, self._before = self._before, None
                found = mx.set_cache_limit(before)
                if found != MLX_CACHE:  # set by somebody else since
                    mx.set_cache_limit(found)


_limit = _Limit()


def limit_cache(owner: object) -> Callable[[], object]:
    """Keep MLX's cache small until the returned function is called, or ``owner`` is collected."""
    _limit.change(1)
    release = weakref.finalize(owner, _limit.change, -1)
    release.atexit = False
    return release

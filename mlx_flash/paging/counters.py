"""What the paged layers of a loaded model count."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Counters:
    """Counted since loading, all layers together; one object, handed to everything that counts.

    Args:
        hits: rows that were in slots when they were needed.
        misses: rows that had to be read when they were needed, and rows that were read into a
            buffer, whole layers and prefetched neurons among them.
        wait_seconds: time that the calling thread waited for reads.
        prefetched: rows whose reading began before they were asked for.
        prefetch_hits: of those, the ones that the next step asked for.
        predicted: rows that predictors named, or experts that routers chose.
        layer_calls: calls of layers whose rows are predicted or chosen.
        predict_seconds: time that predictors took.
        manage_seconds: time for bookkeeping and for handing row numbers over, reads not included.
    """

    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0
    prefetched: int = 0
    prefetch_hits: int = 0
    predicted: int = 0
    layer_calls: int = 0
    predict_seconds: float = 0.0
    manage_seconds: float = 0.0

    def start(self) -> tuple[float, float]:
        """When some bookkeeping begins, for ``count_managing``."""
        return time.perf_counter(), self.wait_seconds

    def count_managing(self, start: tuple[float, float]) -> None:
        """Add the time since ``start`` to ``manage_seconds``, less what was waited meanwhile."""
        began, waited = start
        self.manage_seconds += time.perf_counter() - began - (self.wait_seconds - waited)

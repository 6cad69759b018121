"""How fast this machine reads a model's row file: measured once, kept in the user's cache.

What is measured is the package's own reader on the model's own file, past the page cache: random
rows, a few at once and many, since a disk gives more when it is asked for more, and whole layers
one behind the other. Every row is read once, so nothing can have it in a cache of its own.

Knows: row files, the reader, where a cache directory is. Does not know: models, budgets, tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.common.files import digest_of
from mlx_flash.common.platform import current_platform
from mlx_flash.common.user_cache import recall, remember
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.storage.reader import RowReader

FORMAT_VERSION = 2
ROUNDS = 5  # of each number of rows at once; the median counts
READ_BYTES = 96 << 20  # a number of rows at once is tried until so much has been read
PAUSE_SECONDS = 0.004  # of computing before each read, as a model does: a disk at rest answers late
MEMORY_BYTES = 128 << 20  # of slots to read into, at most


@dataclass(frozen=True)
class DiskSpeed:
    """Seconds and bytes of reads, by the number of rows that are wanted of a layer at once.

    Args:
        rows: ascending; the last is a whole layer, or what memory was allowed for.
        seconds: until all of them are there.
        nbytes: read for them; more than the rows where it is cheaper to read what lies between.
        requests: that it took.
        sequential: bytes a second of whole layers one behind the other.
        measured: when.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    nbytes: tuple[float, ...]
    requests: tuple[float, ...]
    sequential: float
    measured: str

    def time(self, count: float) -> float:
        """Seconds for so many rows at once."""
        return self._at(self.seconds, count)

    def bytes_for(self, count: float) -> float:
        """Bytes read for so many rows at once."""
        return self._at(self.nbytes, count)

    def requests_for(self, count: float) -> float:
        """Requests for so many rows at once."""
        return self._at(self.requests, count)

    def _at(self, values: Sequence[float], count: float) -> float:
        if count <= 0:
            return 0.0
        if count <= self.rows[0]:
            return values[0]  # one row takes as long as the disk takes to answer
        if count >= self.rows[-1]:
            return values[-1] * count / self.rows[-1]
        return float(np.interp(count, self.rows, values))


def machine_facts() -> dict[str, Any]:
    """What a speed measured here depends on, whatever the model."""
    return {
        "version": FORMAT_VERSION,
        "machine": current_platform().machine_name(),
        "mlx": mx.__version__,
        "device": str(mx.default_device()),
    }


def disk_speed(
    reader: RowReader, parts: Sequence[str] | None = None, again: bool = False
) -> DiskSpeed:
    """The speed of the disk under a reader's file; measured if it is not known, or ``again``.

    Args:
        parts: of a row, those that are read; None for all.
    """
    extent = reader.file.layers[0]
    facts = machine_facts() | {
        "disk": reader.file.path.stat().st_dev,
        "direct": reader.direct,
        "engine": reader.engine,
        "stride": extent.layout.stride,
        "rows": extent.rows,
        "scatters": extent.layout.scatters,
        "parts": sorted(parts) if parts is not None else None,
    }
    key = digest_of(facts)
    if not again and (known := recall("speeds.json", key)):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return _from_json(known)
    found = measure_disk(reader, parts)
    remember("speeds.json", key, asdict(found) | {"facts": facts})
    return found


def _from_json(fields: dict[str, Any]) -> DiskSpeed:
    lists = {n: tuple(map(float, fields[n])) for n in ("seconds", "nbytes", "requests")}
    rows = tuple(map(int, fields["rows"]))
    if not rows or any(len(values) != len(rows) for values in lists.values()):
        raise ValueError("lists of different lengths")
    return DiskSpeed(
        rows, **lists, sequential=float(fields["sequential"]), measured=str(fields["measured"])
    )


def measure_disk(reader: RowReader, parts: Sequence[str] | None = None) -> DiskSpeed:
    """Measure it now; reads some hundred megabytes."""
    layers, layout = reader.file.layers, reader.file.layers[0].layout
    same = [i for i, layer in enumerate(layers) if layer.layout == layout]
    most = max(1, min(layers[0].rows, MEMORY_BYTES // layout.stride))
    memory = SlotMemory(layout, most, parts=parts)
    random = np.random.default_rng()
    counts = sorted({max(1, most >> shift) for shift in range(16)})
    times: list[list[float]] = []
    sizes: list[tuple[float, float]] = []
    for count in counts:
        rounds = max(2, min(ROUNDS, READ_BYTES // (count * layout.stride)))
        seconds, before = [], reader.stats()
        for _ in range(rounds):
            layer = int(random.choice(same))
            rows = np.sort(random.choice(layers[layer].rows, min(count, layers[layer].rows), False))
            _compute(PAUSE_SECONDS)
            began = time.perf_counter()
            reader.read(layer, rows, np.arange(rows.size), memory.views)
            seconds.append(time.perf_counter() - began)
        spent = reader.stats() - before
        times.append(seconds)
        sizes.append((spent.bytes_read / rounds, spent.requests / rounds))
    return DiskSpeed(
        tuple(counts),
        tuple(float(np.median(seconds)) for seconds in times),
        tuple(nbytes for nbytes, _ in sizes),
        tuple(requests for _, requests in sizes),
        _sequential(reader, same, most, memory),
        date.today().isoformat(),
    )


def _compute(seconds: float) -> None:
    """Keep the back end busy for about so long."""
    ends = time.perf_counter() + seconds
    a = mx.full((256, 256), 0.5)
    while time.perf_counter() < ends:
        mx.eval(a @ a)


def _sequential(reader: RowReader, layers: Sequence[int], rows: int, memory: SlotMemory) -> float:
    """Bytes a second of rows in their order, two reads under way, as whole layers are streamed."""
    stride = reader.file.layers[layers[0]].layout.stride
    slots = np.arange(rows)
    prepared = reader.prepare(slots, slots, memory.views, layers[0])
    began, before = time.perf_counter(), reader.stats()
    last: list[Any] = []
    for i in range(max(2, min(len(layers), 4 * READ_BYTES // (rows * stride)))):
        layer = layers[i % len(layers)]
        if reader.file.layers[layer].rows < rows:
            continue
        now = reader.submit(layer, prepared)
        reader.wait(last)
        last = now
    reader.wait(last)
    return (reader.stats() - before).bytes_read / max(time.perf_counter() - began, 1e-9)

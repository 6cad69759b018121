"""Which rows each token of a text needs.

A trace is recorded once for a model; the misses under any number of slots and any policy are then
counted without the model, see ``paging.simulate``.

Knows: row numbers. Does not know: how a trace is recorded, slots, what reading takes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from mlx_flash.paging.sparse_ffn import LONG_PROMPT, STREAM_SHARE


@dataclass(frozen=True)
class RowUse:
    """A trace.

    Args:
        rows: of each layer.
        active: of each layer bool [tokens, rows]: what each token needs.
    """

    rows: tuple[int, ...]
    active: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Of the text."""
        return len(self.active[0]) if self.active else 0

    def per_token(self, layer: int) -> float:
        """Rows that a token needs of a layer, on average."""
        return float(self.active[layer].sum()) / max(1, self.tokens)

    def steps(self, layer: int, tokens: range) -> list[np.ndarray]:
        """Row numbers that each of some tokens needs."""
        return [np.flatnonzero(self.active[layer][i]) for i in tokens]

    def prompt(self, layer: int, tokens: range, chunk: int, paged: bool) -> list[np.ndarray]:
        """Row numbers that the chunks of a prompt bring through the layer's slots.

        Args:
            paged: a chunk goes through the slots however many rows it needs, as of experts; else
                a long one, or one that needs most rows, is computed from all and passes them by.
        """
        found = []
        for at in range(tokens.start, tokens.stop, chunk):
            part = self.active[layer][at : min(at + chunk, tokens.stop)]
            wanted = np.flatnonzero(part.any(axis=0))
            dense = len(part) >= LONG_PROMPT or wanted.size > STREAM_SHARE * self.rows[layer]
            if paged or not dense:
                found.append(wanted)
        return found

    def to_bytes(self) -> bytes:
        """For a file."""
        file = io.BytesIO()
        packed = {f"layer-{i}": np.packbits(bits, axis=1) for i, bits in enumerate(self.active)}
        np.savez_compressed(file, rows=np.array(self.rows, np.int64), **packed)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> RowUse:
        """What ``to_bytes`` made; ValueError where it is not that."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as saved:
                rows = tuple(int(n) for n in saved["rows"])
                active = tuple(
                    np.unpackbits(saved[f"layer-{i}"], axis=1, count=n).astype(bool)
                    for i, n in enumerate(rows)
                )
        except Exception as error:  # zip's own, numpy's own
            raise ValueError(f"no trace: {error}") from error
        return cls(rows, active)

"""The app's loop over the paged packages, in Python on the interpreter: a model for apps.

A token's embedding is looked up in a file. For each layer: attention, prediction, then the rows
that were predicted are brought, either all of them handed over (``rows``), or only those that the
state of rows does not hold yet, over the least recently used ones (``cache``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coreml_export.errors import ExportError
from mlx_flash.errors import DamagedError
from mlx_flash.storage.row_file import RowFile

from .dense_host import causal_mask
from .interpreter import Package, State


class Rows:
    """The row file, mapped.

    Raises:
        RowFileError, DamagedError: it is not the one that the manifest describes.
    """

    def __init__(self, path: Path, expected: dict[str, Any]) -> None:
        file = RowFile(path)
        offsets = [layer.offset for layer in file.layers]
        if offsets != expected["offsets"] or file.layout.stride != expected["stride"]:
            raise DamagedError(
                f"{path} is not laid out as the manifest says; copy the export again"
            )
        self._layout, self._expected = file.layout, expected
        mapped = np.memmap(path, np.uint8, "r")
        self._layers = [
            mapped[layer.offset : layer.offset + layer.nbytes].reshape(
                layer.rows, file.layout.stride
            )
            for layer in file.layers
        ]

    def take(self, layer: int, rows: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
        """Some rows as functions take them, filled up with zeros to ``count``.

        Returns:
            rows [count, width]; of int8 also their scales and biases [count, extra].
        """
        found = self._layers[layer][rows]
        kinds = [np.int8, np.float16] if self._expected["dtype"] == "int8" else [np.float16]
        widths = [self._expected["width"], self._expected["extra"]]
        tables = []
        for part, kind, width in zip(self._layout.parts, kinds, widths, strict=False):
            table = np.zeros((count, width), kind)
            piece = np.ascontiguousarray(found[:, part.offset : part.offset + part.nbytes])
            table[: len(rows)] = piece.view(kind)
            tables.append(table)
        return tuple(tables)


class Slots:
    """Which row is in which slot of one layer's state; the least recently used leaves.

    The last slot stays empty: entries of a call that hold no new row are zeros and go there.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity - 1
        self._slot_of: dict[int, int] = {}  # in order of use
        self.evicted = 0

    def bring(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make room for rows; returns (those that are missing, the slots to write them to)."""
        wanted = set(rows.tolist())
        missing = [r for r in rows.tolist() if r not in self._slot_of]
        for row in rows.tolist():
            if row in self._slot_of:
                self._slot_of[row] = self._slot_of.pop(row)
        free = iter(range(len(self._slot_of), self.capacity))
        slots = []
        old = [r for r in self._slot_of if r not in wanted]
        for row in missing:
            slot = next(free, None)
            if slot is None:
                slot = self._slot_of.pop(old.pop(0))
                self.evicted += 1
            slots.append(slot)
            self._slot_of[row] = slot
        return np.array(missing, np.int64), np.array(slots, np.int32)


@dataclass
class Counts:
    """Calls of functions, rows predicted, read and evicted in a run."""

    calls: int = 0
    predicted: int = 0
    read: int = 0
    evicted: int = 0


class PagedHost:
    """One sequence over an export's paged packages.

    Args:
        path: the export's directory.
        manifest: its manifest.
        mode: "rows" or "cache".
    """

    def __init__(self, path: Path, manifest: dict[str, Any], mode: str = "cache") -> None:
        if mode not in ("rows", "cache"):
            raise ExportError(f"a paged host of mode {mode!r}; expected rows or cache")
        paged = manifest["paged"]
        self.mode, self.context = mode, manifest["context"]
        self.layers, self.buckets = paged["layers"], paged["buckets"]
        self.new_rows, self.capacity = paged["new_rows"], paged["cache_rows"]
        self.thresholds = paged["thresholds"]
        self._paged = Package(path / "paged.mlpackage")
        self._predictor = Package(path / "predictor.mlpackage")
        self._rows = Rows(path / paged["rows"]["file"], paged["rows"])
        embedding = manifest["embedding"]
        table = np.memmap(path / embedding["file"], np.float16, "r")
        self._embedding = table.reshape(embedding["shape"])
        self.reset()

    def reset(self) -> None:
        """Begin a new sequence; cached rows stay."""
        self.position = 0
        self.counts = Counts()
        self.ffn_inputs: list[list[np.ndarray]] = [[] for _ in range(self.layers)]
        self.masks: list[list[np.ndarray]] = [[] for _ in range(self.layers)]
        self._keys: dict[int, State] = {}
        if not hasattr(self, "_slots"):
            self._slots = [Slots(self.capacity) for _ in range(self.layers)]
            self._cached: dict[int, State] = {}

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits [tokens, vocabulary] of tokens given one at a time."""
        return np.stack([self.step(int(token)) for token in tokens])

    def step(self, token: int) -> np.ndarray:
        """Logits after one more token."""
        hidden = np.array(self._embedding[token])[None, None]
        mask = causal_mask(self.position, 1, self.context)
        position = np.array([self.position], np.int32)
        for layer in range(self.layers):
            attention = self._paged.function(f"attention_{layer}")
            state = self._keys.setdefault(layer, attention.new_state())
            kind = attention.inputs["hidden"][1]  # the embedding, or the residual stream
            given = {"hidden": hidden.astype(kind), "position": position, "causalMask": mask}
            result = attention(given, state)
            rows = self._predict(layer, result["ffnInput"])
            hidden = self._ffn(layer, result, rows)
            self.counts.calls += 1
        self.position += 1
        self.counts.calls += 1
        return self._paged.function("head")({"hidden": hidden})["logits"][0, 0].astype(np.float32)

    def _predict(self, layer: int, x: np.ndarray) -> np.ndarray:
        threshold = np.array([self.thresholds[layer]], np.float16)
        predict = self._predictor.function(f"predict_{layer}")
        mask = predict({"ffnInput": x, "threshold": threshold})["mask"][0] > 0
        self.ffn_inputs[layer].append(x[0, 0])
        self.masks[layer].append(mask)
        self.counts.calls += 1
        rows = np.flatnonzero(mask)
        self.counts.predicted += len(rows)
        return rows

    def _ffn(self, layer: int, result: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        inputs = {key: result[key] for key in ("residual", "ffnInput")}
        if self.mode == "cache" and len(rows) < self.capacity:
            return self._through_cache(layer, inputs, rows)
        size = next(n for n in self.buckets if n >= len(rows))
        given = dict(zip(("rows", "extra"), self._rows.take(layer, rows, size), strict=False))
        self.counts.read += len(rows)
        self.counts.calls += 1
        return self._paged.function(f"ffn_rows_{size}")(inputs | given)["hiddenOut"]

    def _through_cache(
        self, layer: int, inputs: dict[str, np.ndarray], rows: np.ndarray
    ) -> np.ndarray:
        before = self._slots[layer].evicted
        missing, slots = self._slots[layer].bring(rows)
        self.counts.evicted += self._slots[layer].evicted - before
        self.counts.read += len(missing)
        at, hidden = 0, None
        while hidden is None or at < len(missing):
            left = len(missing) - at
            size = next((n for n in self.new_rows if n >= left), self.new_rows[-1])
            count = min(left, size)
            tables = self._rows.take(layer, missing[at : at + count], size)
            places = np.full(size, self.capacity - 1, np.int32)
            places[:count] = slots[at : at + count]
            given = inputs | dict(zip(("newRows", "extra"), tables, strict=False))
            function = self._paged.function(f"ffn_cache_{size}")
            state = self._cached.setdefault(layer, function.new_state())
            hidden = function(given | {"slots": places}, state)["hiddenOut"]
            at += count
            self.counts.calls += 1
            if not count:
                break
        return hidden

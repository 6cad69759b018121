"""What a row file is: how it is laid out, written, opened and checked.

A row holds all that one unit of an FFN needs: for a neuron its gate row, its up row and its down
column (row-column bundling, LLM in a flash, section 3.2), for an expert its matrices, with their
scales where they are quantised. The file is a plain safetensors file with one tensor per layer,
``layers.{i}.rows``; data start on a page and the row stride is a multiple of the alignment, so that
every row can be read by one aligned request. Layers may differ in their rows' layout.

Knows: bytes, offsets, hashes. Does not know: MLX, what the numbers mean, who reads them or when.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flash.common.files import hash_file_range
from mlx_flash.common.json_reader import items, parse_json, text, whole
from mlx_flash.errors import DamagedError, ReadError, RowFileError

from .row_layout import ITEMSIZE, PAGE, RowLayout
from .safetensors_header import header_bytes, read_header

FORMAT = "mlx_flash.rows"
FORMAT_VERSION = 2
# What a row is: a neuron, an expert, or all that a layer's FFN consists of.
UNITS = ("neuron", "expert", "layer")
PENDING = "0" * 64  # in place of the hash of a layer that is not written yet


@dataclass(frozen=True)
class Layer:
    """Where a layer's rows are: byte ``offset`` in the file, number of ``rows``, their layout."""

    offset: int
    rows: int
    layout: RowLayout

    @property
    def nbytes(self) -> int:
        return self.rows * self.layout.stride


def each(layouts: RowLayout | Sequence[RowLayout], rows: Sequence[int]) -> list[RowLayout]:
    """One layout a layer, where the same one may be given for all."""
    if isinstance(layouts, RowLayout):
        return [layouts] * len(rows)
    if len(layouts) != len(rows):
        raise ValueError(f"{len(layouts)} layouts for {len(rows)} layers")
    return list(layouts)


def _tensors(layouts: Sequence[RowLayout], rows: Sequence[int]) -> dict[str, Any]:
    """The header's entries, one tensor a layer; layer ``i`` has ``rows[i]`` rows."""
    entries = {}
    start = 0
    for i, (layout, count) in enumerate(zip(layouts, rows, strict=True)):
        dtype = layout.parts[0].dtype
        unpadded = layout.stride == layout.ideal_bytes and len({p.dtype for p in layout.parts}) == 1
        stop = start + count * layout.stride
        entries[f"layers.{i}.rows"] = {
            "dtype": dtype if unpadded else "U8",
            "shape": [count, layout.stride // (ITEMSIZE[dtype] if unpadded else 1)],
            "data_offsets": [start, stop],
        }
        start = stop
    return entries


def row_header(
    layouts: Sequence[RowLayout], rows: Sequence[int], source: str, hashes: Sequence[str], unit: str
) -> bytes:
    """All bytes of a row file before its first row, padded to the alignment of rows."""
    distinct = list(dict.fromkeys(layouts))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "unit": unit,
        "layouts": json.dumps([layout.to_json() for layout in distinct]),
        "layout_of": json.dumps([distinct.index(layout) for layout in layouts]),
        "source": source,
        "sha256": json.dumps(list(hashes)),
    }
    header = {"__metadata__": metadata, **_tensors(layouts, rows)}
    return header_bytes(header, max(PAGE, *(layout.alignment for layout in distinct)))


def file_bytes(
    layouts: RowLayout | Sequence[RowLayout], rows: Sequence[int], source: str, unit: str = UNITS[0]
) -> int:
    """Size in bytes of the row file that these layers make."""
    layouts = each(layouts, rows)
    data = sum(layout.stride * count for layout, count in zip(layouts, rows, strict=True))
    return len(row_header(layouts, rows, source, [PENDING] * len(rows), unit)) + data


def fingerprint_of(hashes: Sequence[str]) -> str:
    """sha256 over the hashes of all layers: what ties a row file to its model directory."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


class RowFile:
    """An existing row file, checked from its header and size alone.

    Raises:
        RowFileError: not a row file, one of a later format version, or one not written to its end.
        DamagedError: the file is shorter or longer than its rows.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        header, data_start = read_row_header(self.path)
        meta = header.pop("__metadata__", None)
        meta = meta if isinstance(meta, dict) else {}
        if meta.get("format") != FORMAT:
            raise RowFileError(
                f"{self.path} is not a row file: its metadata says format "
                f"{meta.get('format')!r}, expected {FORMAT!r}; convert the model again"
            )
        version = meta.get("format_version")
        if version != str(FORMAT_VERSION):
            raise RowFileError(
                f"{self.path} has row format version {version}, this version of mlx_flash reads "
                f"{FORMAT_VERSION}; update mlx_flash or convert the model again"
            )
        try:
            self.unit = meta["unit"]
            _check(self.unit in UNITS, f"rows are of unit {self.unit!r}")
            distinct = [RowLayout.from_json(x) for x in listed(meta, "layouts")]
            which = [whole(x, "layout_of") for x in listed(meta, "layout_of")]
            _check(min(which, default=-1) >= 0, f"layouts of layers: {which!r:.80}")
            layouts = [distinct[i] for i in which]
            self.source = text(meta["source"], "source")
            self.hashes = [text(x, "a hash") for x in listed(meta, "sha256")]
            self.layers = _layers(header, data_start, layouts)
            sound = [x for x in self.hashes if re.fullmatch("[0-9a-f]{64}", x)]
            _check(len(sound) == len(self.hashes) == len(self.layers), "not one hash a layer")
        except (LookupError, TypeError, ValueError) as error:
            raise RowFileError(
                f"{self.path} has a damaged row file header ({error}); convert the model again"
            ) from error
        if PENDING in self.hashes:
            raise RowFileError(
                f"{self.path} is unfinished: layer {self.hashes.index(PENDING)} is not written; "
                "run the conversion again, it goes on there"
            )
        last = self.layers[-1]
        self.bytes = last.offset + last.nbytes
        found = self.path.stat().st_size
        if found != self.bytes:
            raise DamagedError(
                f"{self.path} is {'truncated' if found < self.bytes else 'too long'}: "
                f"{found} bytes found, {self.bytes} expected; "
                "copy it again or convert the model again"
            )

    @property
    def layout(self) -> RowLayout:
        """Of the rows of the first layer; of all rows where they are neurons."""
        return self.layers[0].layout

    @property
    def layouts(self) -> list[RowLayout]:
        """The different layouts of the layers."""
        return list(dict.fromkeys(layer.layout for layer in self.layers))

    @property
    def fingerprint(self) -> str:
        """See ``fingerprint_of``."""
        return fingerprint_of(self.hashes)

    def layer_bytes(self, layer: int) -> int:
        return self.layers[layer].nbytes

    def verify(self, layer: int, progress: Callable[[int], Any] | None = None) -> None:
        """Hash a layer's bytes again; DamagedError names the layer where the hash differs."""
        start, nbytes = self.layers[layer].offset, self.layer_bytes(layer)
        try:
            found = hash_file_range(self.path, start, nbytes, progress)
        except OSError as error:
            raise ReadError(
                error.errno, f"reading {self.path}, layer {layer}: {error.strerror}"
            ) from error
        if found != self.hashes[layer]:
            raise DamagedError(
                f"layer {layer} of {self.path} is damaged: sha256 {found}, "
                f"expected {self.hashes[layer]}; copy the file again or convert the model again"
            )


def read_row_header(path: Path) -> tuple[dict[str, Any], int]:
    """A row file's header and the byte at which the rows start; RowFileError for other files."""
    try:
        return read_header(path)
    except FileNotFoundError:
        raise RowFileError(f"{path} does not exist; convert the model again") from None
    except OSError as error:
        raise RowFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RowFileError(
            f"{path} is not a safetensors file: {error}; convert the model again"
        ) from error


def listed(metadata: dict[str, Any], key: str) -> list[Any]:
    """A list that a header's metadata hold as text; ValueError or LookupError without one."""
    found = text(metadata[key], key)
    return items(parse_json(found, unique=True, finite=True), key)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _layers(header: dict[str, Any], data_start: int, layouts: list[RowLayout]) -> list[Layer]:
    """Where the layers are; their entries must be the very ones that the layouts make."""
    rows = [whole(header[f"layers.{i}.rows"]["shape"][0], "rows") for i in range(len(header))]
    _check(bool(rows) and min(rows) > 0, f"rows of layers: {rows!r:.80}")
    _check(len(layouts) == len(rows), f"layouts of {len(layouts)} layers, not {len(rows)}")
    _check(header == _tensors(layouts, rows), "tensors are not those of its layouts")
    layers, at = [], data_start
    for layout, count in zip(layouts, rows, strict=True):
        _check(at % layout.alignment == 0, f"a layer's data start at byte {at}")
        layers.append(Layer(at, count, layout))
        at += layers[-1].nbytes
    return layers

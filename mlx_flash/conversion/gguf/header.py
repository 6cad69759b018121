"""The header of a GGUF file: metadata as plain values and where every tensor lies.

Knows: the container, and which tensor types can be read. Does not know: architectures or names.

The gguf package's reader parses it; it makes numpy views of every token and merge. For SmolLM2-135M
(49,000 of each) that took 2.6 to 3.6 s and 166 MB on a Linux core, of which 22 MB stay; a llama-3
vocabulary has 3.6 times as many entries.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from os import stat_result
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mlx_flash.errors import DamagedError, ModelError

from .block_formats import is_readable, readable_types


class Tensor(NamedTuple):
    """Where a tensor lies; ``shape`` has rows first, unlike the file."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int

    @property
    def type(self) -> GGMLQuantizationType:
        return GGMLQuantizationType(self.kind)

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.row_bytes


class _Header(GGUFReader):
    """The library's reader, but it refuses to read past the end and makes no views of tensors."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise EOFError(end)
        return super()._get(offset, dtype, count, *rest, **named)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        self.infos = []
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            shape = tuple(int(d) for d in reversed(dims.tolist()))
            if not shape:
                raise ValueError(f"tensor {bytes(name)!r} has no dimensions")
            at = int(start_offs) + int(offset[0])
            self.infos.append(Tensor(str(bytes(name), "utf-8"), int(kind[0]), shape, at))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before the message of what goes wrong inside."""
    try:
        yield
    except (ModelError, DamagedError) as error:
        raise type(error)(f"{path}: {error}") from error


def check_file(path: Path) -> stat_result:
    if not path.is_file():
        raise ModelError("no such file; expected a .gguf file")
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ModelError(f"cannot be opened: {error.strerror}") from error
    if not head:
        raise ModelError("the file is empty; expected a GGUF file")
    if head[:4] != b"GGUF":
        raise ModelError(f"begins with {head[:4]!r}, expected b'GGUF': not a GGUF file")
    version = int.from_bytes(head[4:], "little")
    if len(head) == 8 and version not in (2, 3):
        raise ModelError(
            f"GGUF version {version} or a big-endian file; expected 2 or 3, little-endian. "
            "Convert the model to GGUF anew"
        )
    return path.stat()


def read_header(path: Path, size: int) -> tuple[dict[str, Any], list[Tensor]]:
    """All metadata as plain values, and the tensor table; the reader is gone on return."""
    try:
        text, infos = _dump_header(path)
    except EOFError as error:
        raise DamagedError(
            f"truncated inside the header: that goes on to byte {error.args[0]} at least, the file "
            f"has {size}. Fetch the file again"
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(f"unreadable GGUF header ({error}); fetch the file again") from error
    meta = json.loads(text)
    if (shards := meta.get("split.count", 0)) not in (0, 1):
        raise ModelError(f"one of {shards} shards; merge them first (llama-gguf-split --merge)")
    return meta, infos


def _dump_header(path: Path) -> tuple[str, list[Tensor]]:
    """Metadata as JSON: its strings lie among the reader's views and would keep their pages."""
    reader = _Header(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return json.dumps(fields), reader.infos


def check_types(infos: list[Tensor]) -> None:
    twice = [name for name, count in Counter(t.name for t in infos).items() if count > 1]
    if twice:
        raise ModelError(f"tensors that occur twice: {some(twice)}")
    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    bad = [
        f"{t.name} is {names.get(t.kind, f'type {t.kind}')}"
        for t in infos
        if not is_readable(t.kind)
    ]
    if bad:
        raise ModelError(
            f"tensor types that are not supported: {some(bad)}; supported: "
            f"{', '.join(readable_types())}. Quantise the model to one of these instead, or "
            "convert its Hugging Face checkpoint"
        )


def check_extents(infos: list[Tensor], size: int) -> None:
    if beyond := [t for t in infos if t.end > size]:
        first = min(beyond, key=lambda t: t.offset)
        raise DamagedError(
            f"truncated: tensor {first.name} ends at byte {first.end}, the file has {size}. "
            "Fetch the file again"
        )


def some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

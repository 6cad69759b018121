"""The header of a GGUF file: metadata as plain values and where every tensor lies.

Knows: the container, its rules (GGUF specification, version 2 and 3, little-endian), and which
tensor types can be read. Does not know: architectures or names.

Time and memory are in proportion to the header: at most about 10 bytes of memory for a byte of the
file, and a file whose header is longer than ``HEADER_BYTES`` is refused.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from os import stat_result
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mlx_flash import errors
from mlx_flash.errors import DamagedError, ModelError

from .block_formats import is_readable, readable_types

HEADER_BYTES = 32 << 20  # the largest vocabularies, of 260,000 tokens, need less than 15
READ_BYTES = 1 << 20  # at a time
ALIGNMENT = 32
MOST_DIMENSIONS = 4
MOST_NESTING = 8  # of arrays in arrays, of which no known file has any

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_TYPES = {int(kind): np.dtype(form) for kind, form in _SCALARS.items()}
_STRING, _ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)


class Tensor(NamedTuple):
    """Where a tensor lies; ``shape`` has rows first, unlike the file; ``file`` is its shard."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    file: Path = Path()

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


@dataclass(frozen=True)
class Header:
    """What a header says.

    Args:
        meta: every key's value: a number, a bool, a string, or a list of these.
        tensors: in the order of the file.
        alignment: of the tensors' data, in bytes.
        sha256: of the header's bytes.
    """

    meta: dict[str, Any]
    tensors: list[Tensor]
    alignment: int
    sha256: str


class _Cursor:
    """Reads a header on from its beginning; never past the file's end nor past HEADER_BYTES."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._data = file, size, bytearray()
        self.at = 0

    def bytes(self, count: int) -> bytearray:
        at = self.at
        end = at + count
        if end > len(self._data):
            self._read_to(end)
        self.at = end
        return self._data[at:end]

    def _read_to(self, end: int) -> None:
        if end > self._size:
            raise EOFError(end)
        if end > HEADER_BYTES:
            raise DamagedError(
                f"the header goes on to byte {end} at least; expected at most {HEADER_BYTES}, "
                "more than twice that of any model known"
            )
        self._data += self._file.read(max(end - len(self._data), READ_BYTES))
        if end > len(self._data):
            raise EOFError(end)

    def u32(self) -> int:
        return struct.unpack("<I", self.bytes(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.bytes(8))[0]

    def text(self) -> str:
        return str(self.bytes(self.u64()), "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(depth + 1)
        return self._numbers(kind, 1)[0]

    def _array(self, depth: int) -> list[Any]:
        if depth > MOST_NESTING:
            raise ValueError(f"arrays are nested more than {MOST_NESTING} deep")
        kind, count = self.u32(), self.u64()
        if kind in _TYPES:
            return self._numbers(kind, count)
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        return [self.value(kind, depth) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _TYPES:
            raise ValueError(f"a value is of type {kind}")
        form = _TYPES[kind]
        raw = self.bytes(count * form.itemsize)
        return np.frombuffer(raw, form).tolist()

    def sha256(self) -> str:
        """Of what was read so far."""
        return hashlib.sha256(memoryview(self._data)[: self.at]).hexdigest()


def naming(path: Path) -> AbstractContextManager[None]:
    """Puts the file's name before the message of what goes wrong inside."""
    return errors.naming(path, ModelError, DamagedError)


def check_file(path: Path) -> stat_result:
    """The file's stat; ModelError unless it begins as a GGUF file of a version that is read."""
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


def read_header(path: Path, size: int) -> Header:
    """The header of a file of ``size`` bytes.

    Raises:
        DamagedError: the file ends inside it, or it breaks the format's rules.
    """
    try:
        with open(path, "rb") as file:
            return _parse(path, _Cursor(file, size))
    except EOFError as error:
        raise DamagedError(
            f"truncated inside the header: that goes on to byte {error.args[0]} at least, the file "
            f"has {size}. Fetch the file again"
        ) from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise DamagedError(f"unreadable GGUF header ({error}); fetch the file again") from error


def _parse(path: Path, cursor: _Cursor) -> Header:
    cursor.bytes(8)
    tensor_count, key_count = cursor.u64(), cursor.u64()
    meta: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in meta:
            raise ValueError(f"key {key[:80]!r} occurs twice")
        meta[key] = cursor.value(cursor.u32())
    alignment = meta.get("general.alignment", ALIGNMENT)
    # A power of two of at least 8, as the specification has it: a multiple of 8.
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.60}, expected 8, 16, 32 or more")
    found = [_tensor(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    tensors = [t._replace(offset=t.offset + start, file=path) for t in found]
    return Header(meta, tensors, alignment, cursor.sha256())


def _tensor(cursor: _Cursor) -> Tensor:
    """An entry of the tensor table; its offset counts from where the data begin."""
    name, dimensions = cursor.text(), cursor.u32()
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.u64() for _ in range(dimensions)]))
    if 0 in shape:
        raise ValueError(f"tensor {name[:80]!r} is empty")
    return Tensor(name, cursor.u32(), shape, cursor.u64())


def check_types(tensors: list[Tensor]) -> None:
    """Raises ModelError for tensors that occur twice or whose type has no reader."""
    twice = [name for name, count in Counter(t.name for t in tensors).items() if count > 1]
    if twice:
        raise ModelError(f"tensors that occur twice: {some(twice)}")
    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    bad = [
        f"{t.name} is {names.get(t.kind, f'type {t.kind}')}"
        for t in tensors
        if not is_readable(t.kind)
    ]
    if bad:
        raise ModelError(
            f"tensor types that are not supported: {some(bad)}; supported: "
            f"{', '.join(readable_types())}. Quantise the model to one of these instead, or "
            "convert its Hugging Face checkpoint"
        )


def check_extents(tensors: list[Tensor], size: int, alignment: int) -> None:
    """Raises DamagedError unless every tensor of one file lies aligned, inside it, and alone.

    Args:
        tensors: those of the file, of readable types.
        size: of the file, in bytes.
        alignment: that of the header.
    """
    if beyond := [t for t in tensors if t.end > size]:
        first = min(beyond, key=lambda t: t.offset)
        raise DamagedError(
            f"truncated: tensor {first.name} ends at byte {first.end}, the file has {size}. "
            "Fetch the file again"
        )
    for tensor in tensors:
        if tensor.offset % alignment:
            raise DamagedError(
                f"tensor {tensor.name} begins at byte {tensor.offset}, expected a multiple of "
                f"{alignment}. Fetch the file again"
            )
    for first, second in pairwise(sorted(tensors, key=lambda t: t.offset)):
        if second.offset < first.end:
            raise DamagedError(
                f"tensor {second.name} begins at byte {second.offset}, inside {first.name}, which "
                f"ends at {first.end}. Fetch the file again"
            )


def some(names: list[str], most: int = 8) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(re.sub(r"[^ -~]", "?", name)[:120] for name in names[:most]) + more

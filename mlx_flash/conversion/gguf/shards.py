"""One model in one GGUF file, or in several that llama-gguf-split made of it.

The first shard has all metadata, each shard the tensors that lie in it. Shards stand beside each
other as NAME-00001-of-00003.gguf and so on, and count themselves from 0 in ``split.no``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flash.errors import DamagedError, ModelError

from .header import (
    Header,
    Tensor,
    check_extents,
    check_file,
    check_types,
    naming,
    read_header,
    some,
)

SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """What one file, or all of its shards, have.

    Args:
        meta: of the first shard.
        tensors: of all; types that can be read, every one inside its file and apart from others.
        fingerprint: differs where a file has changed: names, sizes, times, hashes of headers.
    """

    meta: dict[str, Any]
    tensors: list[Tensor]
    fingerprint: list[Any]


def open_source(path: Path) -> Source:
    """The file, with the shards that belong to it.

    Raises:
        ModelError: it is no GGUF file, or not the first of its shards, or another is missing.
        DamagedError: a file is cut off or breaks the format's rules.
    """
    with naming(path):
        first, stamp = _read(path)
        count = first.meta.get("split.count", 0)
        others = [] if count in (0, 1) else _others(path, first.meta, count)
    headers, stamps = [first], [stamp]
    for number, other in enumerate(others, 1):
        with naming(other):
            header, stamp = _read(other)
            _check_number(header.meta, number, count)
        headers.append(header)
        stamps.append(stamp)
    tensors = [tensor for header in headers for tensor in header.tensors]
    expected = first.meta.get("split.tensors.count", len(tensors))
    if others and expected != len(tensors):
        raise DamagedError(
            f"{path}: its {count} shards have {len(tensors)} tensors, expected {expected!r:.60}. "
            "Fetch them again"
        )
    with naming(path):
        check_types(tensors)  # again, for names that occur in two shards
    return Source(first.meta, tensors, stamps)


def _read(path: Path) -> tuple[Header, list[Any]]:
    stat = check_file(path)
    header = read_header(path, stat.st_size)
    check_types(header.tensors)
    check_extents(header.tensors, stat.st_size, header.alignment)
    return header, [path.name, stat.st_size, stat.st_mtime_ns, header.sha256]


def _others(path: Path, meta: dict[str, Any], count: Any) -> list[Path]:
    """The shards behind the first, all there; ModelError unless ``path`` is that one."""
    match = SHARD_NAME.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise ModelError(
            f"one of {count!r:.60} shards, but its name is not like NAME-00001-of-00003.gguf, by "
            "which the others are found; give them their names back, or merge them "
            "(llama-gguf-split --merge)"
        )
    names = [f"{match[1]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    if meta.get("split.no") != 0 or path.name != names[0]:
        raise ModelError(f"not the first of {count} shards; give that one, {names[0]}")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise ModelError(f"{len(missing)} of {count} shards are not beside it: {some(missing, 3)}")
    return [path.parent / name for name in names[1:]]


def _check_number(meta: dict[str, Any], number: int, count: int) -> None:
    found = (meta.get("split.no"), meta.get("split.count"))
    if found != (number, count):
        raise DamagedError(
            f"says that it is shard {found[0]!r:.60} of {found[1]!r:.60}, expected {number} of "
            f"{count}, counted from 0. Fetch it again"
        )

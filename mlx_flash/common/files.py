"""Writing files whole or not at all, and hashing them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """See a file or the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file and see it to the disk."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def replace_text(file: Path, text: str) -> None:
    """Write a file for a user, whole or not at all; into a pipe or a device as it is."""
    if file.exists() and not file.is_file():  # not to be replaced
        file.write_text(text, encoding="utf-8")
        return
    file = file.resolve()
    temporary = file.with_name(file.name + ".writing")
    try:
        write_text(temporary, text)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def hash_file_range(
    path: Path, offset: int, nbytes: int, progress: Callable[[int], Any] | None = None
) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        f.seek(offset)
        while nbytes and (block := f.read(min(nbytes, 1 << 22))):
            digest.update(block)
            nbytes -= len(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def sha256_of(path: Path, progress: Callable[[int], Any] | None = None) -> str:
    """sha256 of a whole file, read in blocks."""
    return hash_file_range(path, 0, path.stat().st_size, progress)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by another one, whole, whoever else writes it at the same time."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".writing")
    try:
        with open(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)

"""Files: written whole or not at all, hashed, seen to the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # what a write to a full disk ends with
NAME_BYTES = 255  # of a file's name, on the file systems of macOS and Linux
_TEMPORARY = re.compile(r"mlx_flash-writing-[0-9a-f]{12}(\..*)?")


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; the file written to it becomes ``path`` at the end.

    The file is flushed to the disk, renamed, and its folder flushed, so that after a power loss
    ``path`` is the old file or the new one. If the block raises, ``path`` stays as it was and the
    temporary file is removed. Several processes may replace one file at the same time.

    Yields:
        A name that nothing has yet, with the suffix of ``path`` (some libraries append one to any
        other name).
    """
    temporary = path.with_name(f"mlx_flash-writing-{secrets.token_hex(6)}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def beside(path: Path, suffix: str) -> Path:
    """``path`` with a suffix to its name, for what is made beside it.

    A name that would become too long for the file system is cut; a hash keeps two of them apart.
    """
    name = path.name
    if len(os.fsencode(name + suffix)) > NAME_BYTES:
        kept = os.fsencode(name)[: NAME_BYTES - len(os.fsencode(suffix)) - 9]
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        name = f"{kept.decode(errors='ignore')}-{digest}"
    return path.with_name(name + suffix)


def is_temporary(path: Path) -> bool:
    """Whether a file's name is one that ``replacing`` gives: left there by a kill."""
    return _TEMPORARY.fullmatch(path.name) is not None


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file, or replace it, whole or not at all; see ``replacing``. Text becomes UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_text(file: Path, text: str) -> None:
    """Write a file that a user named: ``atomic_write``, but follow links, and write into pipes
    and devices as they are.
    """
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    atomic_write(file.resolve(), text)


def written(error: OSError) -> Any:
    """The file that an error of writing is about; None where it does not say.

    A copy that fails names two, the file that was read first, even where the disk is full.
    """
    copied = error.errno in FULL and error.filename2
    return error.filename2 if copied else error.filename


def _sync_folder(path: Path) -> None:
    """Flush a folder's names; folders that may not be opened, or flushed, stay as they are."""
    try:
        sync(path)
    except OSError as error:
        if error.errno in (errno.EIO, *FULL):
            raise


def hash_file_range(
    path: Path, offset: int, nbytes: int, progress: Callable[[int], Any] | None = None
) -> str:
    """sha256 of ``nbytes`` of a file from byte ``offset``, or of those before its end, as hex.

    Args:
        progress: called with the bytes of each block that was read.
    """
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
    """sha256 of a whole file as hex, read in blocks."""
    return hash_file_range(path, 0, path.stat().st_size, progress)


def sha256_of_json(value: Any) -> str:
    """sha256 of a JSON-ready value as hex, whatever the order of its objects' keys.

    Raises TypeError for what JSON has no form for.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of(value: Any) -> str:
    """32 hex digits that tell JSON-ready values apart: for keys and markers."""
    return sha256_of_json(value)[:32]

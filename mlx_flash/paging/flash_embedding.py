"""The token embedding left on flash: a token needs one row of it.

Where the head has a matrix of its own the embedding is only looked up, and a token's row is a few
kilobytes; held in memory it takes as much as thousands of FFN rows. Rows are read through the page
cache, where those of frequent tokens stay as long as there is room.

Tied embeddings, quantised ones and those under other names than mlx-lm's usual ones stay in memory.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import DamagedError, ReadError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.bounded_embedding import check_tokens
from mlx_flash.models.dtypes import BIT_VIEWS, DTYPES, FLOAT_NAMES
from mlx_flash.models.registry import make_model
from mlx_flash.storage.safetensors_header import header

PATH = "model.embed_tokens"
HEAD = "lm_head"


@dataclass(frozen=True)
class Table:
    """Where an embedding lies.

    Args:
        path: safetensors file.
        offset: of the first row in the file, bytes.
        shape: (tokens, width).
        dtype: safetensors' name, such as "BF16".
    """

    path: Path
    offset: int
    shape: tuple[int, int]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
        return self.shape[1] * DTYPES[self.dtype].size

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.row_bytes


def find(directory: ModelDirectory) -> Table | None:
    """A model's embedding where it can stay on flash, else None."""
    found, names = None, set()
    for shard in directory.shards:
        entries, start = header(shard)
        names |= entries.keys()
        if entry := entries.get(f"{PATH}.weight"):
            try:
                at = start + entry["data_offsets"][0]
                found = Table(shard, at, tuple(entry["shape"]), entry["dtype"])
            except (LookupError, TypeError) as error:
                raise DamagedError(
                    f"the header of {shard} has an entry for {PATH}.weight without a shape, a type "
                    "or offsets; convert the model again"
                ) from error
    own_head = f"{HEAD}.weight" in names
    if found is None or not own_head or len(found.shape) != 2 or found.dtype not in FLOAT_NAMES:
        return None
    if directory.config.get("tie_word_embeddings") or f"{PATH}.scales" in names:
        return None
    return found if type(_module(directory)) is nn.Embedding else None


def _module(directory: ModelDirectory) -> object:
    """The module that the model's class has at ``PATH``; None where it has none."""
    found: object = make_model(directory.config)
    for name in PATH.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


class FlashEmbedding(nn.Module):
    """``nn.Embedding`` whose rows are read as they are asked for.

    Args:
        table: where they lie.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table
        self._file = os.open(table.path, os.O_RDONLY)
        self._closed = weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead

    def __call__(self, tokens: mx.array) -> mx.array:
        """Rows of token numbers [...], as [..., width]; the numbers are evaluated.

        Raises:
            ModelError: the embedding has no such token.
            ReadError: the disk fails, or the file was cut.
        """
        table = self._table
        wanted, place = np.unique(np.array(tokens), return_inverse=True)
        check_tokens(wanted, table.shape[0])
        rows = np.empty((wanted.size, table.row_bytes), np.uint8)
        for row, token in zip(rows, wanted.tolist(), strict=True):
            self._read(row, table.offset + token % table.shape[0] * table.row_bytes)
        dtype = DTYPES[table.dtype]
        unit = np.dtype(f"u{dtype.size}")
        found = mx.array(rows.view(unit), BIT_VIEWS[dtype.size]).view(dtype)
        return found[mx.array(place.reshape(tokens.shape).astype(np.int32))]

    def _read(self, row: np.ndarray, offset: int) -> None:
        done = 0
        while done < row.size:
            try:
                got = os.pread(self._file, row.size - done, offset + done)
            except OSError as error:
                raise ReadError(
                    error.errno,
                    f"reading {self._table.path}, the embedding at offset {offset}: "
                    f"{error.strerror}",
                ) from error
            if not got:
                raise DamagedError(
                    f"{self._table.path} ended at byte {offset + done} inside the embedding; "
                    "it was cut while in use"
                )
            row[done : done + len(got)] = np.frombuffer(got, np.uint8)
            done += len(got)

    def close(self) -> None:
        """Close the file."""
        self._closed()
        self._file = -1

"""A head in the files though the config ties it to the embedding.

mlx-lm throws such a head away in most families and stumbles over it in the others. Where it is the
embedding again it is left out here; where it is another matrix the model gets its own head, as in
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_flash.errors import ModelError
from mlx_flash.storage.safetensors_header import read_entries

HEAD = re.compile(r"(?:.*\.)?lm_head|output")
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "tok_embeddings",
    "token_embeddings",
    "embedding",
)
PARTS = ("weight", "scales", "biases")
TIED = "tie_word_embeddings"
BLOCK = 1 << 22  # bytes compared at once


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie, and what they are."""

    file: Path
    offset: int
    nbytes: int
    kind: tuple[Any, ...]

    def equals(self, other: Stored) -> bool:
        """Whether both are the same numbers; read in blocks, nothing is kept."""
        if (self.kind, self.nbytes) != (other.kind, other.nbytes):
            return False
        with open(self.file, "rb") as a, open(other.file, "rb") as b:
            a.seek(self.offset)
            b.seek(other.offset)
            for done in range(0, self.nbytes, BLOCK):
                size = min(BLOCK, self.nbytes - done)
                if a.read(size) != b.read(size):
                    return False
        return True


def head_left_in(model: nn.Module, files: Iterable[Path]) -> tuple[set[str], bool]:
    """Names of a head's tensors that a model has no place for, and whether they differ.

    Args:
        model: as its config makes it.
        files: safetensors of the checkpoint.

    Returns:
        (names, own): no names where the model has a head, or the files have none, or no embedding
        beside it; ``own`` where the head is not the embedding again.
    """
    if has_head(model):
        return set(), False
    modules: dict[str, dict[str, Stored]] = {}
    for file in files:
        entries, start = read_entries(file)
        for name, entry in entries.items():
            base, _, part = name.rpartition(".")
            if part in PARTS and (HEAD.fullmatch(base) or base.split(".")[-1] in EMBEDDINGS):
                begin, end = entry["data_offsets"]
                kind = (entry["dtype"], *entry["shape"])
                stored = Stored(file, start + begin, end - begin, kind)
                modules.setdefault(base, {})[part] = stored
    heads = {base: parts for base, parts in modules.items() if HEAD.fullmatch(base)}
    others = [parts for base, parts in modules.items() if base not in heads]
    if not others:  # it stands alone; the model's own ``sanitize`` puts it in the embedding's place
        return set(), False
    names = {f"{base}.{part}" for base, parts in heads.items() for part in parts}
    return names, not all(any(_same(h, other) for other in others) for h in heads.values())


def has_head(model: nn.Module) -> bool:
    """Whether a model has a head of its own."""
    names = [name for name, _ in tree_flatten(model.parameters())]
    return any(HEAD.fullmatch(name) or HEAD.fullmatch(name.rpartition(".")[0]) for name in names)


def untie(config: dict[str, Any]) -> None:
    """Let a config say that the head is not the embedding."""
    config[TIED] = False
    if isinstance(text := config.get("text_config"), dict) and TIED in text:
        text[TIED] = False


@contextmanager
def refusing_head(path: Path, config: dict[str, Any]) -> Iterator[None]:
    """Turn the refusal of an untied config into one that says why it was untied."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"the lm_head of {path} differs from the embedding, but a {config['model_type']} model "
            "uses its embedding as the head; take the checkpoint that this one was made from, or "
            "save it with the head tied"
        ) from error


def _same(head: dict[str, Stored], embedding: dict[str, Stored]) -> bool:
    return head.keys() == embedding.keys() and all(
        part.equals(embedding[name]) for name, part in head.items()
    )

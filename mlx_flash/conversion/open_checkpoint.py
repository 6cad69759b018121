"""Opens whatever a user names: a Hugging Face directory, a hub name or a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
from mlx_lm import utils

from mlx_flash.errors import ModelError
from mlx_flash.models.quantized_rows import QuantScheme

from .adapter import Adapter
from .checkpoint import AS_IT_IS, Checkpoint, Packing
from .gguf.checkpoint import GGUFCheckpoint
from .huggingface import HFCheckpoint

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(
    source: str | Path, packing: Packing = AS_IT_IS, adapter: Adapter | None = None
) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory or a hub name ("org/name").

    With an adapter it is the adapted model; a GGUF's tensors are made floats for it.
    """
    path = Path(source)
    try:
        is_file, exists = path.is_file(), path.exists()
    except OSError as error:
        raise ModelError(f"no such model: {source}: {error.strerror}") from error
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{path} is a file but no .gguf; expected a GGUF file, a Hugging Face directory "
                "or a hub name"
            )
        if packing.scheme:
            raise ModelError(
                f"{path}: a GGUF is not quantised anew; leave -q out (its Q4_0, Q4_1 and Q8_0 are "
                "kept as they are), or quantise the float checkpoint"
            )
        floats = packing.dequantize or adapter is not None
        gguf = GGUFCheckpoint(path, packing.dtype, floats)
        return gguf if adapter is None else AdaptedCheckpoint(gguf, adapter)
    if not exists:
        path = _download(str(source))
    return HFCheckpoint(path, packing, adapter)


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name) or name.lower().endswith(".gguf"):
        raise ModelError(
            f"no such model: {name!r} is neither a file, nor a directory, nor a hub name (org/name)"
        )
    from huggingface_hub import snapshot_download

    patterns = [*utils.DEFAULT_ALLOW_PATTERNS, "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own, its HTTP library's, the disk's: all are no model
        raise ModelError(
            f"no such model: {name!r} is not a directory here and could not be fetched from the "
            f"Hugging Face hub: {error}"
        ) from error


class AdaptedCheckpoint:
    """A float checkpoint whose tensors an adapter changes as they are taken."""

    def __init__(self, base: GGUFCheckpoint, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.config = adapter.adapted_config(base.config)
        adapter.check_names(base.shapes.keys())
        self._float = next(t for t in base.dtypes.values() if mx.issubdtype(t, mx.floating))
        self.shapes = base.shapes | adapter.added
        self.dtypes = base.dtypes | dict.fromkeys(adapter.added, self._float)
        self.fingerprint = base.fingerprint + adapter.sha256[:16]
        self.predictors: dict[str, mx.array] = {}
        self.row_scheme: QuantScheme | None = None

    def take(self, name: str) -> mx.array:
        if name in self._base.shapes:
            changed = self._adapter.apply(name, self._base.take(name))
        else:
            changed = self._adapter.make(name, self._float)
        mx.eval(changed)
        return changed

    def write_tokenizer(self, out: Path) -> None:
        self._base.write_tokenizer(out)

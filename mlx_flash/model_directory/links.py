"""Symbolic links in a directory that somebody else has made: which are followed.

Links within the directory are, and those that the Hugging Face hub's cache is made of: a snapshot's
files lead into the ``blobs`` folder beside ``snapshots``, and directories that
``snapshot_download(local_dir=...)`` once filled lead into the user's own cache. Weights may lie
anywhere else, too: people keep them on another disk, and they are read as tensors of this model or
not at all. Any other file that led out of the directory would be copied, hashed or shown for what
it is, such as a README.md that is the user's own /etc/passwd.
"""

from __future__ import annotations

from pathlib import Path

from mlx_flash.errors import ModelError

WEIGHTS = (".safetensors", ".gguf")


def check_link(file: Path, directory: Path) -> None:
    """Raise ModelError for a link that leads out of ``directory`` to something that may be private.

    Args:
        file: in the directory, or below.
    """
    if file.suffix in WEIGHTS:
        return
    target, own = file.resolve(), directory.resolve()
    if target.is_relative_to(own) or _in_hub_cache(target, own):
        return
    raise ModelError(
        f"{file} is a link that leads out of {directory}, to {target}, and is not read; "
        "put the file itself there"
    )


def _in_hub_cache(target: Path, own: Path) -> bool:
    """Whether a link's target is a blob of the repository that ``own`` is a snapshot of, or any
    blob of the user's cache.
    """
    if own.parent.name == "snapshots" and target.parent == own.parent.parent / "blobs":
        return True
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE).resolve()
    return target.parent.name == "blobs" and target.parent.parent.parent == cache

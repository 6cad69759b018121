"""Where a conversion writes: ``OUT.partial`` beside the target, which becomes OUT at the end.

A kill at any moment leaves what was at OUT as it was, or the new one, whole; but between the two
renames that replace an old model directory it is called ``OUT.replaced``, and the next conversion
to OUT puts it back first. Nothing that mlx_flash did not write is ever removed.

Knows: what may be replaced, locks, disk space, renames. Does not know: what is written.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from pathlib import Path

from mlx_flash.common.files import beside, is_temporary, sync
from mlx_flash.common.work_directory import WorkDirectory, existing
from mlx_flash.errors import ConvertError, FlashError

from .config import ROW_FILE, read_config
from .directory import ModelDirectory

# What ``calibrate`` adds to a model directory; of no use to another conversion.
CALIBRATION = (
    "predictors.safetensors",
    "experts.json",
    "calibration.json",
    "calibration.txt",
    "calibration.png",
)
MARKER = "convert.key"  # in OUT.partial: which conversion it belongs to


def check_target(out: Path, force: bool, source: str | Path) -> None:
    """Raise ConvertError unless ``out`` can be made, or replaced where ``force`` allows it."""
    if out.name in ("", ".."):
        raise ConvertError(f"cannot write {out}: give the directory's own name")
    try:
        if out.exists() or out.is_symlink():
            _drop_marker(out)
            _check_replaceable(out, force, Path(source))
        above = existing(out.parent)
        if not above.is_dir():
            raise ConvertError(f"cannot write {out}: {above} is no directory")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ConvertError(f"cannot write {out}: no permission to write in {above}")
    except OSError as error:
        raise ConvertError(f"cannot write {out}: {error.strerror}") from error


def _drop_marker(out: Path) -> None:
    """What a kill between the last rename and the end leaves."""
    if not out.is_symlink() and (out / MARKER).is_file() and _is_ours(out):
        (out / MARKER).unlink(missing_ok=True)


def _check_replaceable(out: Path, force: bool, source: Path) -> None:
    if not force:
        raise ConvertError(f"{out} exists; choose another --mlx-path, or replace it with --force")
    if out.is_symlink() or out.is_mount() or not _is_ours(out):
        raise ConvertError(
            f"{out} exists and is no model directory made by mlx_flash; it is not replaced, "
            "not even with --force"
        )
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise ConvertError(
            f"the source {source} lies in {out}, which --force would remove; "
            "move it, or choose another --mlx-path"
        )
    if strange := _strange_files(out):
        raise ConvertError(
            f"{out} holds files that mlx_flash did not write ({', '.join(strange)}); "
            "move them before it is replaced"
        )
    old = _replaced(out)
    if old.is_symlink() or (old.exists() and (not _is_ours(old) or _strange_files(old))):
        raise ConvertError(f"{old} is in the way and not made by mlx_flash; move it")


def _is_ours(path: Path) -> bool:
    """Whether it is an empty directory or a model directory, sound or not."""
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        return isinstance(read_config(path).get("flash"), dict)
    except FlashError:
        return False


def _strange_files(out: Path) -> list[str]:
    if not any(out.iterdir()):
        return []
    flash = read_config(out)["flash"]
    files = flash.get("files")
    ours = {"config.json", ROW_FILE, ".DS_Store", *CALIBRATION}
    ours |= files.keys() if isinstance(files, dict) else set()
    return sorted(f.name for f in out.iterdir() if f.name not in ours and not is_temporary(f))


def check_in_place(path: Path) -> None:
    """Raise ConvertError unless the model directory can be replaced by one made of it."""
    try:
        if path.is_symlink() or path.is_mount():
            raise ConvertError(f"{path} is a link or a mount point; give the directory itself")
        if strange := _strange_files(path):
            raise ConvertError(
                f"{path} holds files that mlx_flash did not write ({', '.join(strange)}); move "
                "them before it is replaced, or write to another directory"
            )
        old = _replaced(path)
        if old.is_symlink() or (old.exists() and (not _is_ours(old) or _strange_files(old))):
            raise ConvertError(f"{old} is in the way and not made by mlx_flash; move it")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ConvertError(f"cannot replace {path}: no permission to write in {path.parent}")
    except OSError as error:
        raise ConvertError(f"cannot replace {path}: {error.strerror}") from error


def check_disk(out: Path, total: int, instead: str = "another --mlx-path") -> None:
    """Raise ConvertError unless the disk has room for what is still to be written of ``total``."""
    _work(out).check_disk(total, f"choose {instead}", out)


def _work(out: Path) -> WorkDirectory:
    partial = beside(out, ".partial")
    return WorkDirectory(partial, MARKER, "conversion", ConvertError)


def _replaced(out: Path) -> Path:
    return beside(out, ".replaced")


def working_directory(out: Path, key: str) -> AbstractContextManager[Path]:
    """``OUT.partial``, made or taken over for this process alone; see ``WorkDirectory.claim``.

    Args:
        out: what it will become, by ``replace``.
        key: of the conversion; what another one left is removed.
    """
    return _work(out).claim(key, before=lambda: put_back(out))


def put_back(out: Path) -> None:
    """Undo the first rename of a ``replace`` that was cut off before its second."""
    old = _replaced(out)
    if out.exists() or out.is_symlink() or not old.is_dir() or old.is_symlink():
        return
    with contextlib.suppress(FlashError):
        ModelDirectory(old)
        old.rename(out)


def replace(partial: Path, out: Path) -> None:
    """Give the finished directory its name; an old one goes only after that.

    The caller has asked ``check_target`` whether it may.
    """
    sync(partial)
    old = _replaced(out)
    if moved := out.exists():
        if old.exists():
            _remove(old)
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if moved:
            old.rename(out)
        raise
    (out / MARKER).unlink(missing_ok=True)
    sync(out.parent)
    if old.exists() and moved:
        _remove(old)


def _remove(model: Path) -> None:
    """Remove a model directory, its config last: cut off, it is still known as one."""
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    (model / "config.json").unlink(missing_ok=True)
    model.rmdir()

"""A checkpoint to a model directory, one layer at a time.

Everything is written into ``OUT.partial`` beside the target and becomes OUT by one rename at the
end. After an interruption at any moment the same command goes on at the first layer whose hash
does not hold; what comes out is the same to the byte.

Knows: order of work, disk space, what may be overwritten. Does not know: file formats of sources
(``checkpoint``, ``gguf_source``) or of rows (``rows``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import utils

from . import families
from .budget import show
from .cache import DTYPES
from .checkpoint import Checkpoint, open_checkpoint
from .directory import FORMAT_VERSION, ROW_FILE
from .errors import ConvertError, ModelError
from .families import Ffn
from .rows import RowFileWriter, RowLayout, file_bytes, sha256_of

BLOCK_BYTES = 16 << 20
SHARD_BYTES = 5 * 10**9
MARGIN_BYTES = 32 << 20  # tokenizer files, file system overhead
CODES = {dtype: code for code, dtype in DTYPES.items()}
RAW = {2: np.uint16, 4: np.uint32}
Progress = Callable[[int], Any]


def convert(
    source: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int, str], Any] | None = None,
) -> Path:
    """Make the model directory ``out`` from a GGUF file, a Hugging Face directory or a hub name.

    Args:
        source: path or hub name.
        out: directory to make; must not exist unless ``force``.
        dtype: float16, bfloat16 or float32; None keeps the checkpoint's float type (bfloat16 for
            a quantised GGUF).
        force: replace an existing model directory, at the end and only when all is done.
        progress: called first as (total bytes, "total"), then as (bytes, "layer 3") or the like.

    Raises:
        ModelError, DamagedError: the source is missing, unknown, damaged or contradicts itself.
        ConvertError: the output exists, cannot be written, or the disk is too small.
    """
    out = Path(out)
    _check_target(out, force)
    checkpoint = open_checkpoint(source, dtype)
    job = _Job(checkpoint, dtype, Path(source).name)
    partial = out.with_name(out.name + ".partial")
    with _working_directory(partial, job.key):
        _check_disk(partial, job.total_bytes)
        report = progress or (lambda _bytes, _what: None)
        report(job.total_bytes, "total")
        limit = mx.set_cache_limit(0)
        try:
            job.run(partial, report)
        finally:
            mx.set_cache_limit(limit)
        (partial / "convert.json").unlink()
        _replace(partial, out)
    return out


class _Job:
    """What is to be written, worked out from shapes before anything is read."""

    def __init__(self, checkpoint: Checkpoint, dtype: str | None, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.ffn = families.find(checkpoint.config)
        self.layers = _ffn_names(checkpoint, self.ffn)
        down = [names["down"] for names in self.layers]
        self.d_model = checkpoint.shapes[down[0]][0]
        self.rows = [checkpoint.shapes[name][1] for name in down]
        weights = {name for names in self.layers for name in names.values()}
        types = {checkpoint.dtypes[name] for name in weights}
        if len(types) != 1:
            raise ModelError(
                f"FFN weights are of several types ({', '.join(sorted(map(str, types)))}); "
                "choose one with --dtype"
            )
        self.dtype = types.pop()
        self.layout = RowLayout.plan(self.ffn.parts, CODES[self.dtype], self.d_model)
        self.shards = _shards(checkpoint, sorted(checkpoint.shapes.keys() - weights))
        text = json.dumps([FORMAT_VERSION, checkpoint.fingerprint, dtype, self.layout.to_json()])
        self.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        resident = sum(_nbytes(checkpoint, n) for names in self.shards.values() for n in names)
        self.total_bytes = file_bytes(self.layout, self.rows, self.key) + resident

    def run(self, partial: Path, report: Callable[[int, str], Any]) -> None:
        fingerprint = self._write_rows(partial / ROW_FILE, report)
        for name, tensors in self.shards.items():
            if not (partial / name).exists():
                _write_shard(partial / name, self.checkpoint, tensors, report)
        self._write_index(partial)
        self.checkpoint.write_tokenizer(partial)
        ours = {ROW_FILE, "convert.json", "config.json"}
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in sorted(partial.iterdir())
            if file.is_file() and file.name not in ours
        }
        flash = {
            "format_version": FORMAT_VERSION,
            "row_file": ROW_FILE,
            "rows_fingerprint": fingerprint,
            "unit": "neuron",
            "activation": self.ffn.activation,
            "parts": list(self.ffn.parts),
            "dtype": CODES[self.dtype],
            "source": self.name,
            "files": files,
        }
        config = utils._encode_tagged_floats({**self.checkpoint.config, "flash": flash})
        _write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")

    def _write_rows(self, path: Path, report: Callable[[int, str], Any]) -> str:
        writer = RowFileWriter(path, self.layout, self.rows, self.key)
        try:
            for layer, names in enumerate(self.layers):
                if layer < writer.next_layer():
                    report(self.rows[layer] * self.layout.stride, f"layer {layer} was there")
                    continue
                blocks = self._blocks(names, lambda n, i=layer: report(n, f"layer {i}"))
                writer.write(layer, blocks)
        finally:
            writer.close()
        return hashlib.sha256("".join(writer.hashes).encode()).hexdigest()

    def _blocks(self, names: dict[str, str], report: Progress) -> Iterator[np.ndarray]:
        """A layer's rows as uint8 blocks [n, stride]."""
        weights = {part: _raw(self.checkpoint.take(name)) for part, name in names.items()}
        rows = weights["down"].shape[1]
        if "fused" in weights:
            fused = weights.pop("fused")
            weights["gate"], weights["up"] = fused[:rows], fused[rows:]
        step = max(1, BLOCK_BYTES // self.layout.stride)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            parts = [
                weights[part][:, start:stop].T if part == "down" else weights[part][start:stop]
                for part in self.ffn.parts
            ]
            block = np.zeros((stop - start, self.layout.stride), np.uint8)
            self.layout.pack([np.ascontiguousarray(p).view(np.uint8) for p in parts], block)
            yield block
            report(block.nbytes)

    def _write_index(self, partial: Path) -> None:
        if len(self.shards) == 1:
            return
        where = {name: shard for shard, names in self.shards.items() for name in names}
        total = sum(_nbytes(self.checkpoint, name) for name in where)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write_text(partial / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _ffn_names(checkpoint: Checkpoint, ffn: Ffn) -> list[dict[str, str]]:
    """For each layer, part (or "fused") to weight name; checks that the shapes agree."""
    model_class, args_class = utils._get_classes(checkpoint.config)
    model = model_class(args_class.from_dict(checkpoint.config))
    layers = []
    for path, _ in families.modules(model, ffn):
        places = {"down": ffn.down}
        places |= {"fused": ffn.fused} if ffn.fused else {"up": ffn.up}
        places |= {"gate": ffn.gate} if ffn.gate and not ffn.fused else {}
        names = {part: f"{path}.{place}.weight" for part, place in places.items()}
        d_model, rows = checkpoint.shapes[names["down"]]
        for part, name in names.items():
            expected = {"down": (d_model, rows), "fused": (2 * rows, d_model)}
            if checkpoint.shapes[name] != expected.get(part, (rows, d_model)):
                raise ModelError(
                    f"{name} has shape {checkpoint.shapes[name]}, expected "
                    f"{expected.get(part, (rows, d_model))} beside {names['down']}"
                )
        layers.append(names)
    return layers


def _raw(array: mx.array) -> np.ndarray:
    """The bits of a float array as unsigned integers (numpy has no bfloat16); no copy."""
    bits = array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size])
    mx.eval(bits)
    return np.array(bits, copy=False)


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    return int(np.prod(checkpoint.shapes[name])) * checkpoint.dtypes[name].size


def _shards(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, list[str]]:
    """File name to tensors, no file above ``SHARD_BYTES`` unless one tensor is."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = _nbytes(checkpoint, name)
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, 1)
    }


def _write_shard(
    path: Path, checkpoint: Checkpoint, names: list[str], report: Callable[[int, str], Any]
) -> None:
    """Write tensors one by one; the file gets its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name in names:
        end = at + _nbytes(checkpoint, name)
        header[name] = {
            "dtype": CODES[checkpoint.dtypes[name]],
            "shape": list(checkpoint.shapes[name]),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    temporary = path.with_name(path.name + ".writing")
    with open(temporary, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = _raw(checkpoint.take(name))
            f.write(memoryview(np.ascontiguousarray(data)).cast("B"))
            report(data.nbytes, name)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _check_target(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise ConvertError(f"{out} exists; choose another --mlx-path, or replace it with --force")
    if not _is_ours(out):
        raise ConvertError(
            f"{out} exists and is no model directory made by mlx_flash; it is not replaced, "
            "not even with --force"
        )


def _is_ours(out: Path) -> bool:
    if not out.is_dir() or out.is_symlink():
        return False
    if not any(out.iterdir()):
        return True
    try:
        return "flash" in json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return False


@contextmanager
def _working_directory(partial: Path, key: str) -> Iterator[None]:
    """Take over or make the directory of an unfinished conversion, for this process alone."""
    marker = partial / "convert.json"
    if partial.exists() and not marker.is_file() and any(partial.iterdir()):
        raise ConvertError(f"{partial} is in the way and not made by mlx_flash; move it")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConvertError(f"cannot write {partial}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConvertError(f"another conversion is writing {partial}; wait for it") from None
        if os.pread(lock, 64, 0).decode(errors="replace") != key:
            for file in partial.iterdir():
                if file != marker:
                    file.unlink() if not file.is_dir() else shutil.rmtree(file)
            os.ftruncate(lock, 0)
            os.pwrite(lock, key.encode(), 0)
        yield
    except OSError as error:
        if isinstance(error, ConvertError | ModelError) or error.errno is None:
            raise
        raise ConvertError(
            f"writing {partial} failed: {error.strerror}; "
            "make room and run the same command again, it goes on where it stopped"
        ) from error
    finally:
        os.close(lock)


def _check_disk(partial: Path, total: int) -> None:
    there = sum(f.stat().st_blocks * 512 for f in partial.iterdir() if f.is_file())
    free = shutil.disk_usage(partial).free
    if (needed := total + MARGIN_BYTES - there) > free:
        raise ConvertError(
            f"not enough disk for {partial}: {show(needed)} needed, {show(free)} free; "
            "make room or choose another --mlx-path"
        )


def _replace(partial: Path, out: Path) -> None:
    """Give the finished directory its name; an old one goes only after that."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    partial.rename(out)
    if old.exists():
        shutil.rmtree(old)
    directory = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

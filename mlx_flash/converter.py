"""A checkpoint to a model directory, one layer at a time.

After an interruption at any moment the same command goes on at the first layer whose hash does not
hold; what comes out is the same to the byte.

Knows: order of work, what a row is made of. Does not know: file formats of sources
(``checkpoint``, ``gguf_source``) or of rows (``rows``), what may be overwritten (``output``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import utils

from . import families, output, predictor_file
from .architectures import get_classes
from .cache import DTYPES, UNITS
from .checkpoint import Checkpoint, open_checkpoint
from .directory import FORMAT_VERSION, ROW_FILE, config_sha256, find_ffn
from .errors import ModelError
from .families import Ffn, projections, weight_shapes
from .predictor_file import Predictors
from .rows import RowFileWriter, RowLayout, file_bytes, sha256_of
from .shipped import fold

BLOCK_BYTES = 16 << 20
SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
CODES = {dtype: code for code, dtype in DTYPES.items()}
Progress = Callable[[int], Any]


def convert(
    source: str | Path,
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
        progress: called first as (total bytes, "total"), then as (bytes, "layer 3") or the like;
            these add up to the total.

    Raises:
        ModelError, DamagedError: the source is missing, unknown, damaged or contradicts itself.
        ConvertError: the output exists, cannot be written, or the disk is too small.
    """
    target = Path(out).absolute()
    output.check_target(target, force, source)
    checkpoint = open_checkpoint(source, dtype)
    job = _Job(checkpoint, dtype, Path(source).absolute().name)
    output.check_disk(target, job.disk_bytes)
    with output.working_directory(target, job.key) as partial:
        output.check_target(target, force, source)  # again, now that nobody else writes it
        report = progress or (lambda _bytes, _what: None)
        report(job.total_bytes, "total")
        limit = mx.set_cache_limit(0)
        try:
            job.run(partial, report)
        finally:
            mx.set_cache_limit(limit)
        output.check_target(target, force, source)  # and again: hours may have passed
        output.replace(partial, target)
    return Path(out)


class _Job:
    """What is to be written, worked out from shapes before anything is read."""

    def __init__(self, checkpoint: Checkpoint, dtype: str | None, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.ffn = find_ffn(checkpoint.config, Path(name))
        self.layers = _ffn_names(checkpoint, self.ffn)
        down = [names["down"] for names in self.layers]
        self.d_model = checkpoint.shapes[down[0]][0]
        self.rows = [checkpoint.shapes[name][1] for name in down]
        weights = {name for names in self.layers for name in names.values()}
        types = {checkpoint.dtypes[name] for name in weights}
        if len(types) != 1:
            raise ModelError(
                f"FFN weights are of several types ({', '.join(sorted(CODES[t] for t in types))}); "
                "choose one with --dtype"
            )
        self.dtype = types.pop()
        self.layout = RowLayout.plan(self.ffn.parts, CODES[self.dtype], self.d_model)
        self.shards = _shards(checkpoint, sorted(checkpoint.shapes.keys() - weights))
        what = [checkpoint.config, self.layout.to_json(), self.rows, self.shards]
        self.row_source = _digest([FORMAT_VERSION, *what])
        self.key = _digest([self.row_source, checkpoint.fingerprint, dtype])
        resident = sum(_sum_bytes(checkpoint, names) for names in self.shards.values())
        self.total_bytes = self.layout.stride * sum(self.rows) + resident
        predictors = sum(tensor.nbytes for tensor in checkpoint.predictors.values())
        self.disk_bytes = file_bytes(self.layout, self.rows, self.row_source)
        self.disk_bytes += resident + predictors

    def run(self, partial: Path, report: Callable[[int, str], Any]) -> None:
        """Write all that is not there yet; config.json comes last."""
        fingerprint = self._write_rows(partial / ROW_FILE, report)
        for name, tensors in self.shards.items():
            if (partial / name).exists():
                report(_sum_bytes(self.checkpoint, tensors), f"{name} was there")
            else:
                _write_shard(partial / name, self.checkpoint, tensors, report)
        for file in partial.iterdir():
            if file.name not in {ROW_FILE, output.MARKER, *self.shards}:
                file.unlink()
        self._write_index(partial)
        self.checkpoint.write_tokenizer(partial)
        files = {}
        for file in sorted(partial.iterdir()):
            if file.name not in (ROW_FILE, output.MARKER):
                output.sync(file)
                files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        self._write_predictors(partial / predictor_file.NAME, fingerprint)
        self._write_config(partial / "config.json", fingerprint, files)

    def _write_predictors(self, path: Path, fingerprint: str) -> None:
        """Those that ship with the checkpoint; not among ``files``: they may be fitted anew."""
        if tensors := self.checkpoint.predictors:
            layers = fold(tensors, len(self.rows), self.dtype)
            measured = {"source": "shipped with the checkpoint"}
            predictor_file.write(path, Predictors("low-rank", fingerprint, layers, measured))
            output.sync(path)

    def _write_config(self, path: Path, fingerprint: str, files: dict[str, Any]) -> None:
        flash = {
            "format_version": FORMAT_VERSION,
            "row_file": ROW_FILE,
            "rows_fingerprint": fingerprint,
            "unit": "neuron",
            "activation": self.ffn.activation,
            "parts": list(self.ffn.parts),
            "layout": self.layout.to_json(),
            "dtype": CODES[self.dtype],
            "parameters": sum(math.prod(shape) for shape in self.checkpoint.shapes.values()),
            "source": self.name,
            "files": files,
        }
        config = json.loads(json.dumps({**self.checkpoint.config, "flash": flash}))
        config["flash"]["config_sha256"] = config_sha256(config)
        config = utils._encode_tagged_floats(config)
        output.write_text(path, json.dumps(config, indent=2) + "\n")

    def _write_rows(self, path: Path, report: Callable[[int, str], Any]) -> str:
        writer = RowFileWriter(path, self.layout, self.rows, self.row_source)
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
        taken = {name: _raw(self.checkpoint.take(name)) for name in dict.fromkeys(names.values())}
        weights = {part: taken[name] for part, name in names.items()}
        rows = weights["down"].shape[1]
        if self.ffn.fused:
            weights["gate"], weights["up"] = weights["gate"][:rows], weights["up"][rows:]
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
        total = sum(_sum_bytes(self.checkpoint, names) for names in self.shards.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        output.write_text(partial / INDEX, json.dumps(index, indent=2) + "\n")


def _digest(what: Any) -> str:
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _ffn_names(checkpoint: Checkpoint, ffn: Ffn) -> list[dict[str, str]]:
    """For each layer, part to name of the weight that holds it; checks that the shapes agree."""
    model_class, args_class = get_classes(checkpoint.config)
    model = model_class(args_class.from_dict(checkpoint.config))
    layers = []
    for path, _ in families.modules(model, ffn):
        names = {part: f"{path}.{name}.weight" for part, name in projections(ffn).items()}
        d_model, rows = checkpoint.shapes[names["down"]]
        for name, expected in weight_shapes(ffn, rows, d_model).items():
            found = checkpoint.shapes[f"{path}.{name}.weight"]
            if found != expected:
                raise ModelError(
                    f"{path}.{name}.weight has shape {found}, expected {expected} "
                    f"beside {names['down']}"
                )
        layers.append(names)
    return layers


def _raw(array: mx.array) -> np.ndarray:
    """The bits of a float array as unsigned integers (numpy has no bfloat16); no copy."""
    bits = array.view(UNITS[array.dtype.size])
    mx.eval(bits)
    return np.array(bits, copy=False)


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    return math.prod(checkpoint.shapes[name]) * checkpoint.dtypes[name].size


def _sum_bytes(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    return sum(_nbytes(checkpoint, name) for name in names)


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
            f.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
            report(data.nbytes, name)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)

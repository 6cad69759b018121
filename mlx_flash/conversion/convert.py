"""A checkpoint to a model directory, one layer at a time.

After an interruption at any moment the same command goes on at the first layer whose hash does not
hold; what comes out is the same to the byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.common.files import atomic_write, digest_of, replacing, sha256_of, sync
from mlx_flash.errors import ModelError
from mlx_flash.model_directory import writing
from mlx_flash.model_directory.config import (
    FORMAT_VERSION,
    ROW_FILE,
    config_sha256,
    write_config,
)
from mlx_flash.models.dtypes import DTYPE_NAMES, DTYPES
from mlx_flash.models.quantized_rows import requested_scheme
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import Predictors
from mlx_flash.storage.row_file import file_bytes
from mlx_flash.storage.row_writer import RowFileWriter
from mlx_flash.storage.safetensors_header import header_bytes

from .adapter import Adapter
from .checkpoint import Checkpoint, RequestedFormat
from .finite import finite_only
from .open_checkpoint import open_checkpoint
from .row_plan import plan_rows, raw
from .side_files import check_tokenizer
from .turbosparse import fold

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    dequantize: bool = False,
    adapter: str | Path | None = None,
    allow_nonfinite: bool = False,
    force: bool = False,
    progress: Callable[[int, str], Any] | None = None,
) -> Path:
    """Make the model directory ``out`` from a GGUF file, a Hugging Face directory or a hub name.

    Args:
        source: path or hub name.
        out: directory to make; must not exist unless ``force``.
        dtype: float16, bfloat16 or float32; None keeps the checkpoint's float type (float16 for
            a GGUF with quantised tensors, since that is the type of their scales).
        quantize: quantise, as mlx-lm's ``convert`` does (a checkpoint that is quantised already
            is kept as it is, without being asked). A neuron that can be read alone gets scales of
            its own, along d_model.
        q_bits, q_group_size, q_mode: how; None takes the mode's defaults (affine: 4 bits, 64).
        quant_predicate: one of mlx-lm's mixed recipes, such as mixed_4_6.
        dequantize: make floats of a quantised checkpoint.
        adapter: one that ships with this package, by name, or a file: the model is changed by it.
            Tensors of a GGUF are made floats for that.
        allow_nonfinite: keep weights that are NaN or infinite; by default they are refused.
        force: replace an existing model directory, at the end and only when all is done.
        progress: called first as (total bytes, "total"), then as (bytes, "layer 3") or the like;
            these add up to the total.

    Raises:
        ModelError, DamagedError: the source is missing, unknown, damaged or contradicts itself.
        ConvertError: the output exists, cannot be written, or the disk is too small.
    """
    target = Path(out).absolute()
    writing.check_target(target, force, source)
    if not quantize and (q_bits is not None or q_group_size is not None or q_mode != "affine"):
        raise ModelError("bits, group size and mode are for quantising; ask for that, too (-q)")
    scheme = requested_scheme(q_bits, q_group_size, q_mode) if quantize else None
    requested = RequestedFormat(dtype, scheme, quant_predicate, dequantize, allow_nonfinite)
    changes = Adapter.open(adapter) if adapter else None
    checkpoint = open_checkpoint(source, requested, changes)
    name = Path(source).absolute().name
    job = _Job(checkpoint, requested, f"{name} with {changes.path.stem}" if changes else name)
    writing.check_disk(target, job.disk_bytes)
    check_tokenizer(checkpoint)
    with writing.working_directory(target, job.key) as partial:
        writing.check_target(target, force, source)  # again, now that nobody else writes it
        report = progress or (lambda _bytes, _what: None)
        report(job.total_bytes, "total")
        limit = mx.set_cache_limit(0)
        try:
            job.run(partial, report)
        finally:
            mx.set_cache_limit(limit)
        writing.check_target(target, force, source)  # and again: hours may have passed
        writing.replace(partial, target)
    return Path(out)


class _Job:
    """What is to be written, worked out from shapes before anything is read."""

    def __init__(self, checkpoint: Checkpoint, requested: RequestedFormat, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.take = checkpoint.take if requested.allow_nonfinite else finite_only(checkpoint.take)
        self.rows = plan_rows(checkpoint)
        resident = sorted(checkpoint.shapes.keys() - self.rows.tensors)
        self.shards = _shards(checkpoint, resident)
        layouts = [layout.to_json() for layout in self.rows.layouts]
        what = [checkpoint.config, self.rows.unit, layouts, self.rows.rows, self.shards]
        self.row_source = digest_of([FORMAT_VERSION, *what])
        self.key = digest_of([self.row_source, checkpoint.fingerprint, asdict(requested)])
        nbytes = _sum_bytes(checkpoint, resident)
        self.total_bytes = nbytes + sum(
            layout.stride * count
            for layout, count in zip(self.rows.layouts, self.rows.rows, strict=True)
        )
        predictors = sum(tensor.nbytes for tensor in checkpoint.facts.predictors.values())
        self.disk_bytes = nbytes + predictors
        self.disk_bytes += file_bytes(
            self.rows.layouts, self.rows.rows, self.row_source, self.rows.unit
        )

    def run(self, partial: Path, report: Callable[[int, str], Any]) -> None:
        """Write all that is not there yet; config.json comes last."""
        fingerprint = self._write_rows(partial / ROW_FILE, report)
        for name, tensors in self.shards.items():
            if (partial / name).exists():
                report(_sum_bytes(self.checkpoint, tensors), f"{name} was there")
            else:
                _write_shard(partial / name, self.checkpoint, tensors, self.take, report)
        for file in partial.iterdir():
            if file.name not in {ROW_FILE, writing.MARKER, *self.shards}:
                file.unlink()
        self._write_index(partial)
        self.checkpoint.write_tokenizer(partial)
        files = {}
        for file in sorted(partial.iterdir()):
            if file.name not in (ROW_FILE, writing.MARKER):
                sync(file)
                files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        self._write_predictors(partial / predictor_file.NAME, fingerprint)
        self._write_config(partial / "config.json", fingerprint, files)

    def _write_predictors(self, path: Path, fingerprint: str) -> None:
        """Those that ship with the checkpoint; not among ``files``: they may be fitted anew."""
        if tensors := self.checkpoint.facts.predictors:
            layers = fold(tensors, len(self.rows.rows), DTYPES[self.rows.dtype])
            measured = {"source": "shipped with the checkpoint"}
            predictor_file.write(path, Predictors("low-rank", fingerprint, layers, measured))
            sync(path)

    def _write_config(self, path: Path, fingerprint: str, files: dict[str, Any]) -> None:
        flash = {
            "format_version": FORMAT_VERSION,
            "row_file": ROW_FILE,
            "rows_fingerprint": fingerprint,
            "unit": self.rows.unit,
            "activation": self.rows.activation,
            "layouts": [layout.to_json() for layout in dict.fromkeys(self.rows.layouts)],
            "dtype": self.rows.dtype,
            "quantization": asdict(self.rows.row_scheme) if self.rows.row_scheme else None,
            "parameters": self.checkpoint.spec.parameters,
            "source": self.name,
            "requantised": dict(self.checkpoint.facts.requantised),
            "files": files,
        }
        config = json.loads(json.dumps({**self.checkpoint.config, "flash": flash}))
        config["flash"]["config_sha256"] = config_sha256(config)
        write_config(path, config)

    def _write_rows(self, path: Path, report: Callable[[int, str], Any]) -> str:
        plan, take = self.rows, self.take
        writer = RowFileWriter(path, plan.layouts, plan.rows, self.row_source, plan.unit)
        try:
            for layer, (layout, count) in enumerate(zip(plan.layouts, plan.rows, strict=True)):
                if layer < writer.next_layer():
                    report(count * layout.stride, f"layer {layer} was there")
                else:
                    writer.write(layer, _reported(plan.blocks(layer, take), layer, report))
        finally:
            writer.close()
        return writer.fingerprint

    def _write_index(self, partial: Path) -> None:
        if len(self.shards) == 1:
            return
        where = {name: shard for shard, names in self.shards.items() for name in names}
        total = sum(_sum_bytes(self.checkpoint, names) for names in self.shards.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        atomic_write(partial / INDEX, json.dumps(index, indent=2) + "\n")


def _reported(
    blocks: Iterator[np.ndarray], layer: int, report: Callable[[int, str], Any]
) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        report(block.nbytes, f"layer {layer}")


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
    path: Path,
    checkpoint: Checkpoint,
    names: list[str],
    take: Callable[[str], mx.array],
    report: Callable[[int, str], Any],
) -> None:
    """Write tensors one by one; the file gets its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name in names:
        end = at + _nbytes(checkpoint, name)
        header[name] = {
            "dtype": DTYPE_NAMES[checkpoint.dtypes[name]],
            "shape": list(checkpoint.shapes[name]),
            "data_offsets": [at, end],
        }
        at = end
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(header_bytes(header))
        for name in names:
            data = raw(take(name))
            f.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
            report(data.nbytes, name)

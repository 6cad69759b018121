"""Writes a model directory with its rows in another order.

Whole rows move, so quantised ones need no thought. What else counts rows moves with them: biases
among the resident weights, the predictors' tensors. ``row_order.safetensors`` keeps which row of
the conversion is where.

The new directory is written beside the old one and takes its name at the end. A kill at any moment
leaves the old one or the new one, whole, and the same call goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.calibration.report_files import JSON, PLOT, TABLE
from mlx_flash.calibration.text_run import Progress
from mlx_flash.common.files import atomic_write, digest_of, sha256_of, sync
from mlx_flash.common.json_reader import read_json
from mlx_flash.errors import ConvertError, DamagedError
from mlx_flash.model_directory import writing
from mlx_flash.model_directory.config import ROW_FILE, config_sha256, write_config
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.predictors import predictor_file, registry
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import RowLayout
from mlx_flash.storage.row_writer import RowFileWriter
from mlx_flash.storage.safetensors_header import check_file

from . import ordering
from .resident_tensors import write_permuted

NAME = "row_order.safetensors"
BLOCK_BYTES = 32 << 20  # rows that are held at once while they are written


def check_target(source: Path, target: Path) -> None:
    """Raise ConvertError unless the new directory may be put at ``target``."""
    if target == source:
        writing.check_in_place(source)
    elif target.exists() or target.is_symlink():
        raise ConvertError(f"{target} exists; choose another --out")
    else:
        writing.check_target(target, False, source)


def disk_bytes(directory: ModelDirectory) -> int:
    """Bytes of a whole new directory; in place, too, the old one stays until it is whole."""
    files = sum(entry["bytes"] for entry in directory.files.values())
    rows = sum(layer.rows for layer in directory.rows.layers)
    predictors = directory.path / predictor_file.NAME
    return (
        directory.rows.bytes
        + files
        + 8 * rows
        + (predictors.stat().st_size if predictors.is_file() else 0)
    )


def write(
    directory: ModelDirectory,
    target: Path,
    orders: list[np.ndarray],
    resident: dict[str, int],
    info: dict[str, Any],
    progress: Progress,
) -> None:
    """Write a model directory with its rows in another order.

    Args:
        target: where; the source itself to replace it.
        orders: of each layer, the row to put at each place.
        resident: from ``resident_tensors``.
        info: kept as "row_order" in config.json.
        progress: called as ("writing", bytes written, total).
    """
    digest = hashlib.sha256()
    for order in orders:
        digest.update(np.ascontiguousarray(order, np.int64).data)
    key = digest_of([directory.config["flash"]["config_sha256"], digest.hexdigest()])
    with writing.working_directory(target, key) as partial:
        check_target(directory.path, target)  # again, now that nobody else writes it
        fingerprint = _write_rows(directory, partial / ROW_FILE, orders, key, progress)
        for file in partial.iterdir():
            if file.name not in (ROW_FILE, writing.MARKER):
                file.unlink()
        files = _write_files(directory, partial, orders, resident)
        _write_predictors(directory, partial, orders, fingerprint)
        config = json.loads(json.dumps(directory.config))
        config["flash"] |= {"rows_fingerprint": fingerprint, "files": files, "row_order": info}
        config["flash"]["config_sha256"] = config_sha256(config)
        write_config(partial / "config.json", config)
        check_target(directory.path, target)
        writing.replace(partial, target)


def _write_rows(
    directory: ModelDirectory,
    path: Path,
    orders: list[np.ndarray],
    key: str,
    progress: Progress,
) -> str:
    """The row file in the new order; returns its fingerprint."""
    rows = directory.rows
    layouts, counts = [x.layout for x in rows.layers], [x.rows for x in rows.layers]
    total, done = sum(x.nbytes for x in rows.layers), 0
    writer = RowFileWriter(path, layouts, counts, key, rows.unit)
    try:
        reader = RowReader(rows)
        try:
            for i, order in enumerate(orders):
                if i >= writer.next_layer():
                    rows.verify(i)  # else a hash would be made of what is damaged
                    writer.write(i, moved(reader, i, order))
                done += rows.layers[i].nbytes
                progress("writing", done, total)
        finally:
            reader.close()
    finally:
        writer.close()
    return writer.fingerprint


def moved(reader: RowReader, layer: int, order: np.ndarray) -> Iterator[np.ndarray]:
    """A layer's rows in another order, in blocks uint8 [n, stride]."""
    layout: RowLayout = reader.file.layers[layer].layout
    count = max(1, min(order.size, BLOCK_BYTES // layout.stride))
    memory = SlotMemory(layout, count)
    for at in range(0, order.size, count):
        wanted = order[at : at + count]
        slots = np.argsort(wanted, kind="stable")
        reader.read(layer, wanted[slots], slots, memory.views)
        block = np.zeros((wanted.size, layout.stride), np.uint8)
        for part, view in zip(layout.parts, memory.views, strict=True):
            block[:, part.offset : part.offset + part.nbytes] = view[: wanted.size, : part.nbytes]
        yield block


def _write_files(
    directory: ModelDirectory,
    partial: Path,
    orders: list[np.ndarray],
    resident: dict[str, int],
) -> dict[str, Any]:
    """All files that conversion wrote beside the rows; returns their sizes and hashes."""
    files = {}
    for name, entry in directory.files.items():
        if name == NAME:
            continue
        source, target = directory.path / name, partial / name
        if (found := sha256_of(source)) != entry["sha256"]:
            raise DamagedError(
                f"{source} is damaged: sha256 {found}, expected {entry['sha256']}; "
                "copy it again or convert the model again"
            )
        shutil.copyfile(source, target)
        if name.endswith(".safetensors"):
            write_permuted(target, resident, orders)
        sync(target)
        files[name] = {"bytes": target.stat().st_size, "sha256": sha256_of(target)}
    before = _original(directory)
    now = {
        f"layers.{i}.order": mx.array((order if before is None else before[i][order]).astype("i4"))
        for i, order in enumerate(orders)
    }
    mx.save_safetensors(str(partial / NAME), now, {"format": "mlx_flash.row_order"})
    sync(partial / NAME)
    files[NAME] = {"bytes": (partial / NAME).stat().st_size, "sha256": sha256_of(partial / NAME)}
    return files


def _original(directory: ModelDirectory) -> list[np.ndarray] | None:
    """Which row of the conversion is at each place of each layer; None where none was moved."""
    if NAME not in directory.files:
        return None
    file, layers = directory.path / NAME, directory.rows.layers
    try:
        check_file(file)
        tensors = mx.load(str(file))
        found = [np.array(tensors[f"layers.{i}.order"]) for i in range(len(layers))]
    except (RuntimeError, ValueError, KeyError) as error:
        raise DamagedError(f"{file} is damaged: {error}; copy it again") from error
    if not all(ordering.is_order(o, x.rows) for o, x in zip(found, layers, strict=True)):
        raise DamagedError(f"{file} is damaged: it holds no order of the rows; copy it again")
    return found


def _write_predictors(
    directory: ModelDirectory, partial: Path, orders: list[np.ndarray], fingerprint: str
) -> None:
    """Predictors, each row's at its new place, and the report of their calibration."""
    if (path := directory.path / predictor_file.NAME).is_file():
        rows = [layer.rows for layer in directory.rows.layers]
        predictor_file.verify(path)
        found = predictor_file.read(path, directory.rows.fingerprint, rows, directory.d_model)
        found.rows_fingerprint = fingerprint
        shapes = registry.trained()[found.kind].tensors
        for layer, order in zip(found.layers, orders, strict=True):
            layer.tensors = {
                name: moved_tensor(tensor, shapes[name], order)
                for name, tensor in layer.tensors.items()
            }
        predictor_file.write(partial / predictor_file.NAME, found)
    for name in (JSON, TABLE, PLOT):
        if not (source := directory.path / name).is_file():
            continue
        if name.endswith(".json"):
            report = _json(source)
            report["rows_fingerprint"] = fingerprint
            atomic_write(partial / name, json.dumps(report, indent=2) + "\n")
        else:
            shutil.copyfile(source, partial / name)


def moved_tensor(tensor: mx.array, shape: tuple[str, ...], order: np.ndarray) -> mx.array:
    """A tensor with what it has for each row in another order, see ``registry.Training``."""
    if "rows" not in shape:
        return tensor
    return mx.take(tensor, mx.array(order), axis=shape.index("rows"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON: {error}; remove it") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} holds no JSON object; remove it")
    return found

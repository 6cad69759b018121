"""A model directory's rows in another order: those that are needed together, near each other.

Permuting the neurons of an FFN changes its output by rounding only. Whole rows move, so quantised
ones need no thought; what else counts rows moves with them: biases among the resident weights, the
predictors' tensors. ``row_order.safetensors`` keeps which row of the conversion is where.

The new directory is written beside the old one and takes its name at the end (``output``); a kill
at any moment leaves the old one or the new one, whole, and the same call goes on.

Knows: files of a model directory, the order of work. Does not know: what makes a good order
(``row_order``), which rows a token asks for (``row_demand``).
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

from mlx_flash.calibration import recordings
from mlx_flash.calibration.text_run import Progress, TextRun, tokenised
from mlx_flash.common.files import atomic_write, digest_of, sha256_of, sync
from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import ConvertError, DamagedError, ModelError, PredictorError
from mlx_flash.model_directory import writing
from mlx_flash.model_directory.config import ROW_FILE, config_sha256, write_config
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.quantized_rows import without
from mlx_flash.paging.policies import LFU
from mlx_flash.paging.simulate import misses
from mlx_flash.paging.slots.slot_memory import SlotMemory
from mlx_flash.predictors import predictor_file, registry
from mlx_flash.predictors.selection import Selection, select
from mlx_flash.storage.read_requests import gap_bytes
from mlx_flash.storage.reader import REQUEST_BYTES, RowReader
from mlx_flash.storage.row_layout import RowLayout
from mlx_flash.storage.row_writer import RowFileWriter
from mlx_flash.storage.scatter_list import span

from . import access_trace, ordering
from .resident_tensors import resident_tensors, write_permuted

FORMAT_VERSION = 1
NAME = "row_order.safetensors"
TOKENS = 8192
CACHE_SHARE = 0.2  # of the rows in slots, for the figures
WARM = 0.25  # of the held-out tokens, before reads count
BLOCK_BYTES = 32 << 20
REPORTS = ("calibration.json", "calibration.txt", "calibration.png")


def reorder(
    path: str | Path,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    tokens: int = TOKENS,
    ram: int | str | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure which rows are asked for together and write them near each other.

    Args:
        path: model directory whose rows are neurons and whose tokens need some of them only: with
            an activation that has zeros, or with predictors from ``calibrate``.
        out: model directory to make; None to replace ``path`` when all is done.
        data: text to measure on, see ``text.load``.
        tokens: number to learn from; a quarter of it more is for the figures.
        ram: bytes or text such as "4GB" that running the model over the text may take.
        seed: picks sequences from a longer text.
        dry_run: only measure.
        progress: called as (stage, done, total).

    Returns:
        ``text``, ``tokens``, ``predictor``, ``cache_share``, ``before`` and ``after`` (rows,
        requests and bytes of a token, near rows joined), ``written`` (path or
        None), ``done_before`` (the rows are in this order already; nothing was measured).

    Raises:
        FlashError: the directory cannot be reordered or written, the text or the disk is too small.
    """
    source = Path(path).absolute()
    target = source if out is None else Path(out).absolute()
    writing.put_back(source)
    directory = ModelDirectory(source)
    selection = _selection(directory)
    budget = None if ram is None else parse_ram(ram)
    resident = resident_tensors(directory)
    if not dry_run:
        _check_target(source, target)
        writing.check_disk(target, _disk_bytes(directory), "another --out")
    text = tokenised(directory, data, tokens, seed)
    settings = {
        "version": FORMAT_VERSION,
        "text": text.sha256,
        "predictor": selection.kind,
        "fitted": _fitted(selection),
    }
    found = {"text": text.source, "tokens": int(text.train.size), "predictor": selection.kind}
    work = source.with_name(source.name + ".reordering")
    key = digest_of([settings, directory.config["flash"]["config_sha256"]])
    counts = {name: part.size for name, part in text.parts().items()}
    report = progress or (lambda *_: None)
    recordings.check_disk(work, recordings.disk_bytes(directory, access_trace.RECORDS, counts))
    with recordings.working_directory(work, key):
        done = directory.config["flash"].get("row_order") or {}
        if done.get("settings") == settings and target == source and not dry_run:
            found |= {"done_before": True, "written": None}
        else:
            access_trace.record(TextRun(directory, text, work, budget, report), selection)
            orders = _orders(directory, selection, work, report)
            found |= {"done_before": False, "written": None}
            found |= _figures(directory, selection, orders, work, report)
            if not dry_run:
                info = {"settings": settings, **found}
                _write(directory, target, orders, resident, info, report)
                found["written"] = str(target)
        recordings.remove(work)
    return found


def _fitted(selection: Selection) -> str | None:
    """Tells trained predictors apart, whatever the order of rows."""
    if not selection.trained:
        return None
    layers = [[layer.kind, layer.threshold, layer.rank] for layer in selection.layers]
    return digest_of([layers, selection.measured])


def _selection(directory: ModelDirectory) -> Selection:
    if directory.unit != "neuron":
        what = "experts, each read by requests of its own" if directory.mixture else "whole layers"
        raise ModelError(
            f"{directory.path}: its rows are {what}, so their order makes no difference; "
            "only rows of single neurons are put in another order"
        )
    selection = select(directory)
    if selection is None:
        raise PredictorError(
            f"{directory.path}: every row is needed for every token, so their order makes no "
            "difference; fit a threshold first: mlx_flash calibrate --kind threshold"
        )
    return selection


def _check_target(source: Path, target: Path) -> None:
    if target == source:
        writing.check_in_place(source)
    elif target.exists() or target.is_symlink():
        raise ConvertError(f"{target} exists; choose another --out")
    else:
        writing.check_target(target, False, source)


def _orders(
    directory: ModelDirectory, selection: Selection, work: Path, progress: Progress
) -> list[np.ndarray]:
    """Of each layer the row to put at each place; kept in ``work`` one by one."""
    layers = directory.rows.layers
    found = []
    for i, layer in enumerate(layers):
        progress("ordering", i, len(layers))
        kept = recordings.load_layer(work, f"{i:03d}")
        order = kept[1]["order"] if kept else None
        if order is None or not ordering.is_order(order, layer.rows):
            if selection.layers[i].whole:
                order = np.arange(layer.rows)  # read whole
            else:
                active = access_trace.recorded(directory, work, i, "train")
                order = ordering.by_coactivation(active)
            recordings.save_layer(work, f"{i:03d}", {}, {"order": order})
        found.append(order)
    progress("ordering", len(layers), len(layers))
    return found


def _figures(
    directory: ModelDirectory,
    selection: Selection,
    orders: list[np.ndarray],
    work: Path,
    progress: Progress,
) -> dict[str, Any]:
    """What a token reads before and after, by held-out tokens through the default cache."""
    sums = {name: np.zeros(3) for name in ("before", "after")}
    for i, (layer, order) in enumerate(zip(directory.rows.layers, orders, strict=True)):
        progress("counting", i, len(orders))
        active = access_trace.recorded(directory, work, i, "held_out")
        capacity = max(1, round(CACHE_SHARE * layer.rows))
        missed = misses(map(np.flatnonzero, active), layer.rows, capacity, LFU(layer.rows))
        missed = missed[round(WARM * len(missed)) :]
        layout, stride = layer.layout, layer.layout.stride
        gap = gap_bytes() // stride
        skipped = stride - wanted_bytes(layout, selection.provides)
        for name, one in (("before", np.arange(layer.rows)), ("after", order)):
            reads = ordering.reads(missed, one, stride, gap, REQUEST_BYTES, skipped)
            sums[name] += reads.rows, reads.requests, reads.bytes
    progress("counting", len(orders), len(orders))
    names = ("rows", "requests", "bytes")
    shown = {
        name: dict(zip(names, (round(float(n), 1) for n in total), strict=True))
        for name, total in sums.items()
    }
    return {"cache_share": CACHE_SHARE, **shown}


def wanted_bytes(layout: RowLayout, provides: str | None) -> int:
    """Bytes of a row that are read where a part of it is in memory."""
    names = [part.name for part in layout.parts]
    wanted = without(names, provides)
    held = [np.zeros(0, np.uint8) if name in wanted else None for name in names]
    first, last = span(layout, held)
    return last - first


def _disk_bytes(directory: ModelDirectory) -> int:
    """Of a whole new directory: in place, too, the old one stays until the new one is whole."""
    files = sum(entry["bytes"] for entry in directory.files.values())
    rows = sum(layer.rows for layer in directory.rows.layers)
    predictors = directory.path / predictor_file.NAME
    return (
        directory.rows.bytes
        + files
        + 8 * rows
        + (predictors.stat().st_size if predictors.is_file() else 0)
    )


def _write(
    directory: ModelDirectory,
    target: Path,
    orders: list[np.ndarray],
    resident: dict[str, int],
    info: dict[str, Any],
    progress: Progress,
) -> None:
    digest = hashlib.sha256()
    for order in orders:
        digest.update(np.ascontiguousarray(order, np.int64).data)
    key = digest_of([directory.config["flash"]["config_sha256"], digest.hexdigest()])
    with writing.working_directory(target, key) as partial:
        _check_target(directory.path, target)  # again, now that nobody else writes it
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
        _check_target(directory.path, target)
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
    for name in REPORTS:
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
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON: {error}; remove it") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} holds no JSON object; remove it")
    return found

"""Measures which rows of a model are needed together, and has them written near each other.

Permuting the neurons of an FFN changes its output by rounding only. What is interrupted goes on
when the same call is made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.calibration import recordings
from mlx_flash.calibration.text_run import Progress, TextRun, tokenised
from mlx_flash.common.files import beside, digest_of
from mlx_flash.common.sizes import parse_ram
from mlx_flash.errors import ModelError, PredictorError
from mlx_flash.model_directory import writing
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.quantized_rows import without
from mlx_flash.paging.policies import LFU
from mlx_flash.paging.simulate import misses
from mlx_flash.predictors.selection import Selection, select
from mlx_flash.storage.read_requests import gap_bytes
from mlx_flash.storage.reader import REQUEST_BYTES
from mlx_flash.storage.row_layout import RowLayout
from mlx_flash.storage.scatter_list import span

from . import access_trace, ordering, rewriting
from .resident_tensors import resident_tensors

FORMAT_VERSION = 1
TOKENS = 8192
CACHE_SHARE = 0.2  # of the rows in slots, for the figures
WARM = 0.25  # of the held-out tokens, before reads count


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
        rewriting.check_target(source, target)
        writing.check_disk(target, rewriting.disk_bytes(directory), "another --out")
    text = tokenised(directory, data, tokens, seed)
    settings = {
        "version": FORMAT_VERSION,
        "text": text.sha256,
        "predictor": selection.kind,
        "fitted": _fitted(selection),
    }
    found = {"text": text.source, "tokens": int(text.train.size), "predictor": selection.kind}
    work = beside(source, ".reordering")
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
                rewriting.write(directory, target, orders, resident, info, report)
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

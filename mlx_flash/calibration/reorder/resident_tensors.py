"""Resident weights that have one number for each row, such as biases, and moving those numbers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mlx_flash.errors import DamagedError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.models.registry import make_model
from mlx_flash.storage.safetensors_header import header


def resident_tensors(directory: ModelDirectory) -> dict[str, int]:
    """Name of each resident tensor with a number for each row (or two, fused) -> its layer.

    Raises:
        ModelError: an FFN module has other weights as wide as its rows.
    """
    ffn = directory.ffn
    places = families.modules(make_model(directory.config), ffn)
    there = {name for shard in directory.shards for name in header(shard)[0]}
    shapes = {name: e["shape"] for s in directory.shards for name, e in header(s)[0].items()}
    found = {}
    for layer, (path, _) in enumerate(places):
        rows = directory.rows.layers[layer].rows
        named = families.projections(ffn)
        moving = {f"{path}.{name}.bias" for part, name in named.items() if part != "down"}
        found |= dict.fromkeys(moving & there, layer)
        staying = {f"{path}.{named['down']}.bias"}
        staying |= {name for name in there if ffn.norm and name.startswith(f"{path}.{ffn.norm}.")}
        for name in sorted(there - moving - staying):
            if name.startswith(path + ".") and {rows, 2 * rows} & set(shapes[name]):
                raise ModelError(
                    f"{directory.path}: {name} has shape {shapes[name]}, as if it had a number "
                    "for each row, and reorder does not know how to move it; this family's rows "
                    "stay in their order"
                )
        for name in sorted(moving & there):
            if shapes[name] not in ([rows], [2 * rows]):
                raise DamagedError(
                    f"{directory.path}: {name} has shape {shapes[name]}, its layer {rows} rows; "
                    "convert the model again"
                )
    return found


def write_permuted(path: Path, tensors: dict[str, int], orders: list[np.ndarray]) -> None:
    """Put the numbers of these tensors, where the file has them, in their layers' orders."""
    entries, start = header(path)
    with open(path, "r+b") as f:
        for name in entries.keys() & tensors.keys():
            order = orders[tensors[name]]
            begin, end = entries[name]["data_offsets"]
            f.seek(start + begin)
            data = np.frombuffer(f.read(end - begin), np.uint8)
            halves = entries[name]["shape"][0] // order.size
            data = data.reshape(halves, order.size, -1)[:, order]
            f.seek(start + begin)
            f.write(np.ascontiguousarray(data).data)
        f.flush()
        os.fsync(f.fileno())

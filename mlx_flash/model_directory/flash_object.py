"""Types in a model directory's config.json: whatever is read of it later is what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_flash.common.json_reader import (
    entry,
    fields,
    items,
    plain_name,
    show,
    text,
    whole,
)
from mlx_flash.models.quantized_rows import scheme_from

TEXTS = ("rows_fingerprint", "unit", "activation", "dtype", "source", "config_sha256")


def check_flash(flash: dict[str, Any]) -> None:
    """Raise ValueError where the object ``flash`` lacks a key or has one of another type."""
    for key in TEXTS:
        text(entry(flash, key), key)
    plain_name(entry(flash, "row_file"), "row_file")
    items(entry(flash, "layouts"), "layouts")
    whole(entry(flash, "parameters"), "parameters")
    for kind, numbers in fields(entry(flash, "requantised"), "requantised").items():
        if len(items(numbers, show(kind))) != 3:
            raise ValueError(f"requantised has {show(numbers)} for {show(kind)}, expected three")
        for number in numbers:
            whole(number, f"a number of {show(kind)}")
    fields(flash.get("row_order") or {}, "row_order")


def listed_files(flash: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file that ``flash`` lists; ValueError where it lists others."""
    found = {}
    for name, said in fields(entry(flash, "files"), "files").items():
        said = fields(said, f"the entry of {show(name)}")
        found[plain_name(name, "a name in files")] = {
            "bytes": whole(entry(said, "bytes", name), f"bytes of {name}"),
            "sha256": text(entry(said, "sha256", name), f"sha256 of {name}"),
        }
    return found


def check_quantization(config: Mapping[str, Any]) -> None:
    """Raise ValueError where mlx-lm's quantisation in a config names no schemes."""
    if found := config.get("quantization"):
        scheme_from(fields(found, "quantization"))
        for said in found.values():
            if isinstance(said, dict):
                scheme_from(said)

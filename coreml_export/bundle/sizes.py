"""What an export takes: bytes of tensors, how they are cut into packages, disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from coreml_export.errors import ExportError
from coreml_export.program import dense, paged
from coreml_export.quantization.recipes import scheme_of
from coreml_export.settings import Settings
from coreml_export.source.decoder_spec import Decoder, tensors
from coreml_export.source.weights_source import Source

MARGIN_BYTES = 64 << 20  # tokenizer, tables, headers


def tensor_bytes(source: Source, settings: Settings, part: Any) -> int:
    """Bytes that the tensors of a part of a decoder take in a package, each counted once."""
    found = {}
    for tensor, _ in tensors(part):
        shape = source.shapes[tensor.name]
        if tensor.rows is not None:
            shape = (len(tensor.rows), *shape[1:])
        scheme = scheme_of(tensor.name, shape, settings.recipe)
        bits = {"fp16": 16, "int8": 8 + 16 / shape[-1], "int4": 4.5, "palette4": 4.1}[scheme]
        found[tensor.key] = int(math.prod(shape) * bits / 8)
    return sum(found.values())


def dense_plan(source: Source, decoder: Decoder, settings: Settings) -> dense.Plan:
    """How the decoder is cut into packages.

    Raises:
        ExportError: one layer, the embedding or the head alone is too large.
    """
    layers = [tensor_bytes(source, settings, layer) for layer in decoder.layers]
    tied = decoder.head.weight.name == decoder.embedding.name
    embedding = tensor_bytes(source, settings, [decoder.embedding])
    head = 0 if tied else tensor_bytes(source, settings, decoder.head)
    limit = settings.part_bytes - settings.part_bytes // 50  # tables, headers
    for number, nbytes in [*enumerate(layers), ("embedding", embedding), ("head", head)]:
        if nbytes > limit:
            raise ExportError(
                f"part {number} alone takes {nbytes / 1e9:.2f} GB, and no package may go above "
                f"{settings.part_bytes / 1e9:g} GB; export with fewer bits, or a larger --part-size"
            )
    return dense.plan(decoder, layers, (embedding, head), limit)


def check_disk(out: Path, source: Source, decoder: Decoder, settings: Settings) -> None:
    """Raise ExportError unless the disk of ``out`` can hold the export while it is made."""
    needed = largest_bytes(source, decoder, settings)
    above = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise ExportError(
            f"not enough disk for {out}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            "make room, or export with fewer bits or profiles"
        )


def largest_bytes(source: Source, decoder: Decoder, settings: Settings) -> int:
    """Bytes of disk that an export takes at its largest."""
    whole = tensor_bytes(source, settings, decoder)
    total = whole if "dense" in settings.profiles else 0
    if "paged" in settings.profiles:
        stride = paged.row_layout(decoder, settings.rows == "int8").stride
        total += whole + stride * decoder.d_ffn * len(decoder.layers)
        total += 2 * decoder.vocab * decoder.d_embedding
    total += source.parameters * settings.calibrated  # codes found, until the end
    return total + total // 10 + MARGIN_BYTES

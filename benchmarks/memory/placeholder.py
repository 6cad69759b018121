"""A model directory of a published shape that takes no disk: headers, and holes where weights go.

``mlx_flash inspect`` and everything that plans memory see a directory as conversion would make it;
no weight is ever computed or written. It needs a file system with sparse files, as ext4 and APFS
have. The model in it cannot be run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import utils

from mlx_flash.conversion.checkpoint import CheckpointFacts
from mlx_flash.conversion.model_spec import ModelSpec
from mlx_flash.conversion.row_plan import RowPlan, plan_rows
from mlx_flash.model_directory.config import FORMAT_VERSION, config_sha256
from mlx_flash.models.dtypes import DTYPE_NAMES
from mlx_flash.models.registry import make_model
from mlx_flash.storage.row_file import PENDING, RowFile, file_bytes
from mlx_flash.storage.row_writer import RowFileWriter
from mlx_flash.storage.safetensors_header import header_bytes

from .published_shapes import BITS_4, MXFP4

ROW_FILE = "ffn_rows.safetensors"
WRITTEN = "1" * len(PENDING)  # stands in place of a layer's hash


@dataclass
class ShapesOnly:
    """A checkpoint of which only the shapes and types are known; see ``conversion.checkpoint``."""

    config: dict[str, Any]
    spec: ModelSpec
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, mx.Dtype]
    facts: CheckpointFacts = field(default_factory=CheckpointFacts)

    @classmethod
    def of(cls, config: dict[str, Any], stored: str) -> ShapesOnly:
        """What a config's model is made of, in bfloat16 or quantised by mlx-lm itself."""
        config = dict(config)
        spec = ModelSpec.of(config, Path(stored))
        model = make_model(config)
        model.set_dtype(mx.bfloat16)
        if config.get("tie_word_embeddings") and hasattr(model, "sanitize"):
            tied = {k: v for k, v in _flat(model).items() if k != "lm_head.weight"}
            model.sanitize(tied)  # some of mlx-lm's models tie their head only here
        if stored in (BITS_4, MXFP4):
            how = (32, 4, "mxfp4") if stored == MXFP4 else (64, 4, "affine")
            chosen = (lambda path, _: "experts" in path) if stored == MXFP4 else None
            with contextlib.redirect_stdout(io.StringIO()):  # it says how many bits a weight has
                model, config = utils.quantize_model(
                    model, config, how[0], how[1], mode=how[2], quant_predicate=chosen
                )
        arrays = _flat(model)
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        return cls(config, spec, shapes, {name: array.dtype for name, array in arrays.items()})


def make(path: Path, config: dict[str, Any], stored: str) -> Path:
    """Make the directory ``path`` for a config's model; returns it.

    Args:
        stored: BITS_4, BITS_16 or MXFP4, see ``published_shapes``.
    """
    checkpoint = ShapesOnly.of(config, stored)
    rows = plan_rows(checkpoint)
    path.mkdir(parents=True)
    _write_rows(path / ROW_FILE, rows)
    resident = {name: checkpoint.shapes[name] for name in checkpoint.shapes.keys() - rows.tensors}
    weights = path / "model.safetensors"
    _write_resident(weights, resident, checkpoint.dtypes)
    content = json.loads(json.dumps(checkpoint.config))
    content["flash"] = {
        "format_version": FORMAT_VERSION,
        "row_file": ROW_FILE,
        "rows_fingerprint": RowFile(path / ROW_FILE).fingerprint,
        "unit": rows.unit,
        "activation": rows.activation,
        "layouts": [layout.to_json() for layout in dict.fromkeys(rows.layouts)],
        "dtype": rows.dtype,
        "quantization": None,
        "parameters": 0,
        "source": "a published shape, no weights",
        "requantised": {},
        "files": {weights.name: {"bytes": weights.stat().st_size, "sha256": ""}},
    }
    content["flash"]["config_sha256"] = config_sha256(content)
    (path / "config.json").write_text(json.dumps(content, indent=2))
    return path


def _flat(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _write_rows(file: Path, rows: RowPlan) -> None:
    """The row file's header, every layer said to be written, and a hole of their size."""
    source = "a published shape, no weights"
    RowFileWriter(file, rows.layouts, rows.rows, source, rows.unit).close()
    file.write_bytes(file.read_bytes().replace(PENDING.encode(), WRITTEN.encode()))
    os.truncate(file, file_bytes(rows.layouts, rows.rows, source, rows.unit))


def _write_resident(
    file: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, mx.Dtype]
) -> None:
    """A safetensors header as conversion writes it, and a hole of the tensors' size."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name in sorted(shapes):
        size = dtypes[name].size
        for length in shapes[name]:
            size *= length
        header[name] = {
            "dtype": DTYPE_NAMES[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [at, at + size],
        }
        at += size
    start = header_bytes(header)
    file.write_bytes(start)
    os.truncate(file, len(start) + at)

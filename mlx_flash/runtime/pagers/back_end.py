"""What MLX's CPU back end cannot compute, or computes slowly."""

from __future__ import annotations

import mlx.core as mx

from mlx_flash.errors import ModelError
from mlx_flash.model_directory.directory import ModelDirectory


def check_back_end(directory: ModelDirectory) -> None:
    """Raise ModelError where MLX cannot compute a directory's experts.

    Its CPU back end has ``gather_mm`` for float32 only, and says so in the middle of a token.
    """
    if directory.unit != "expert" or mx.default_device().type != mx.DeviceType.cpu:
        return
    types = {
        part.dtype
        for layout in directory.rows.layouts
        for part in layout.parts
        if part.name.endswith(".weight") and part.dtype != "U32"  # that is packed
    }
    if types - {"F32"}:
        raise ModelError(
            f"{directory.path} has experts in {' and '.join(sorted(types))}, and MLX's CPU back "
            "end computes them in float32 only; convert with --dtype float32, or quantised (-q)"
        )


def slow_back_end(directory: ModelDirectory) -> str:
    """What to tell a user whose quantised model MLX's CPU back end computes slowly; else empty."""
    packed = "quantization" in directory.config
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if not packed or not on_cpu or directory.dtype == mx.float32:
        return ""
    return (
        f"{directory.path} is quantised and computes in {str(directory.dtype).rpartition('.')[2]}, "
        "which takes MLX's CPU back end some 8 to 40 times as long as float32; for this machine "
        "convert with --dtype float32"
    )

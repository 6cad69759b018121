"""The data of one tensor of a GGUF file, as MLX arrays: floats, or packed codes with scales.

Knows: reading (never mapping) in blocks of rows, the row order of Q and K in a GGUF, which it
undoes, and what a float type cannot hold. Does not know: names, which tensors a model has.

Taking a tensor needs its own size in the output form and about 20 MB.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from mlx_flash.errors import DamagedError, ModelError, ReadError

from .block_formats import SourceScheme, to_parts
from .header import Tensor
from .names import Place

BLOCK_BYTES = 4 << 20  # of float32 values; the library's working copies are several times that


def read_floats(place: Place, dtype: mx.Dtype) -> mx.array:
    """The evaluated parameter as floats."""
    tensor = place.tensor
    out = mx.zeros((tensor.rows, tensor.shape[-1]), dtype=dtype)
    for start, raw in _blocks(place):
        block = dequantize(raw, tensor.type)
        if place.offset:
            block = block - np.float32(place.offset)
        if dtype == mx.float16 and tensor.type != GGMLQuantizationType.F16:
            top = float(np.abs(block).max())
            if top > 65504:
                raise ModelError(f"{tensor.name} holds {top:g}, beyond float16; choose bfloat16")
        # Evaluated at once, so that mlx updates ``out`` in place instead of copying it.
        out[start : start + len(block)] = mx.array(block).astype(dtype)
        mx.eval(out)
    if place.row is not None:
        out = out[place.row]
    elif place.head_dim and len(tensor.shape) == 1:
        out = out.reshape(-1, place.head_dim // 2, 2).swapaxes(1, 2)
    out = out.reshape(place.shape)
    mx.eval(out)
    return out


def read_packed(place: Place, scheme: SourceScheme, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The evaluated parts of a matrix, or of a stack: ``weight`` (packed) and ``scales``, and
    ``biases`` where the scheme has them."""
    tensor = place.tensor
    shapes, dtypes = packed_shapes(tensor, scheme), packed_dtypes(scheme, dtype)
    outs = {
        part: mx.zeros((tensor.rows, shape[-1]), dtype=dtypes[part])
        for part, shape in shapes.items()
    }
    for start, raw in _blocks(place):
        for (part, out), block in zip(outs.items(), to_parts(raw, tensor.type), strict=True):
            rows = mx.array(block)
            if part != "weight":
                _check_range(rows, f"the {part} of {tensor.name}", dtypes[part])
            out[start : start + len(raw)] = rows.astype(out.dtype)
            mx.eval(out)
    parts = {part: out.reshape(shapes[part]) for part, out in outs.items()}
    mx.eval(parts)
    return parts


def packed_shapes(tensor: Tensor, scheme: SourceScheme) -> dict[str, tuple[int, ...]]:
    """Shape of each part of a matrix that stays quantised."""
    *rows, columns = tensor.shape
    groups = (*rows, columns // scheme.group)
    found = {"weight": (*rows, columns * scheme.bits // 32), "scales": groups}
    return found | {"biases": groups} if scheme.mode == "affine" else found


def packed_dtypes(scheme: SourceScheme, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """Type of each part."""
    if scheme.mode != "affine":
        return {"weight": mx.uint32, "scales": mx.uint8}
    return {"weight": mx.uint32, "scales": dtype, "biases": dtype}


def _check_range(values: mx.array, what: str, dtype: mx.Dtype) -> None:
    top = mx.abs(values).max().item()
    if dtype == mx.uint8:
        if top == 255:  # of an exponent, no number
            raise DamagedError(f"{what} are not all numbers; fetch the file again")
        return
    if not np.isfinite(top):
        raise DamagedError(f"{what} go up to {top}, expected finite numbers; fetch the file again")
    if top > mx.finfo(dtype).max:
        raise ModelError(
            f"{what} go up to {top:g}, beyond {str(dtype).rpartition('.')[2]}; choose float32"
        )


def _blocks(place: Place) -> Iterator[tuple[int, np.ndarray]]:
    """First row and bytes of one block of rows after another, in Hugging Face's order."""
    tensor = place.tensor
    head_dim = place.head_dim if len(tensor.shape) > 1 else 0
    unit = head_dim or 1
    step = max(1, BLOCK_BYTES // (4 * tensor.shape[-1] * unit)) * unit
    for start in range(0, tensor.rows, step):
        raw = read_rows(tensor, start, min(step, tensor.rows - start))
        yield start, _unpermute(raw, head_dim) if head_dim else raw


def read_vector(tensor: Tensor) -> np.ndarray:
    """All numbers of a tensor of one row, float32."""
    return dequantize(read_rows(tensor, 0, 1), tensor.type)[0]


def read_rows(tensor: Tensor, start: int, rows: int) -> np.ndarray:
    """The bytes of ``rows`` rows from ``start`` on."""
    raw = np.empty((rows, tensor.row_bytes), dtype=np.uint8)
    view, at = memoryview(raw).cast("B"), tensor.offset + start * tensor.row_bytes
    try:
        with open(tensor.file, "rb", buffering=0) as file:
            file.seek(at)
            done = 0
            while count := file.readinto(view[done:]):
                done += count
    except OSError as error:
        where = f"{tensor.file}: tensor {tensor.name}, {len(view)} bytes at {at}"
        raise ReadError(f"{where}: {error.strerror}") from error
    if done < len(view):
        raise DamagedError(
            f"the file was cut since it was opened: tensor {tensor.name} goes on to byte "
            f"{at + len(view)}, the file ends at {at + done}. Fetch the file again"
        )
    return raw


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Whole heads in GGUF order (pairs side by side) back to Hugging Face order (halves)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

"""Types of numbers, by the names that configs, safetensors files and MLX give them."""

from __future__ import annotations

import mlx.core as mx

# A config's name of a float type (also what ``--dtype`` takes) -> MLX's type.
FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
# Safetensors' name -> MLX's type, and back.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U8": mx.uint8,
    "U32": mx.uint32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Safetensors' names of the float types; GGUF has the same. Of types that occur equally often in a
# checkpoint the first counts as the checkpoint's.
FLOAT_NAMES = ("F32", "F16", "BF16")
# Bytes of a number -> the unsigned integer that holds its bits (numpy has no bfloat16).
BIT_VIEWS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

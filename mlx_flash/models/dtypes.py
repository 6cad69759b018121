"""Element types: safetensors' names, MLX's types, numpy's words for their bits."""

from __future__ import annotations

import mlx.core as mx

FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U8": mx.uint8,
    "U32": mx.uint32,
}
UNITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
CODES = {dtype: code for code, dtype in DTYPES.items()}

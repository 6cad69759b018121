"""Weights that are no numbers: found while they are converted.

One NaN makes every token that its row takes part in "!", and where it lies in a gate whose rows are
predicted it changes tokens without a word. A pass over the exponent bits of a tensor costs little
beside reading and hashing it.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_flash.errors import ModelError

from .row_plan import raw

# Type -> the bits of the exponent: all of them set is an infinity, or NaN.
EXPONENTS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80, mx.float32: 0x7F800000}
NAN_SCALE = 0xFF  # of a scale that is a power of two (mxfp4, mxfp8)
BLOCK = 1 << 20  # numbers that are looked at in one go


def finite_only(take: Callable[[str], mx.array]) -> Callable[[str], mx.array]:
    """``take`` of a checkpoint, which raises ModelError for a tensor with NaN or infinities."""

    def checked(name: str) -> mx.array:
        found = take(name)
        if wrong := count_nonfinite(name, found):
            raise ModelError(
                f"tensor {name} has {wrong:,} of {found.size:,} weights that are NaN or infinite: "
                "the checkpoint is damaged, or its float type too narrow; get it again, or keep "
                "them with --allow-nonfinite"
            )
        return found

    return checked


def count_nonfinite(name: str, array: mx.array) -> int:
    """How many numbers of a tensor are NaN or infinite; of packed codes none are."""
    scales = array.dtype == mx.uint8 and name.endswith(".scales")
    mask = NAN_SCALE if scales else EXPONENTS.get(array.dtype)
    if mask is None or not array.size:
        return 0
    bits, wrong = raw(array).reshape(-1), 0
    buffer = np.empty(min(bits.size, BLOCK), bits.dtype)
    for at in range(0, bits.size, BLOCK):
        block = bits[at : at + BLOCK]
        exponents = np.bitwise_and(block, bits.dtype.type(mask), out=buffer[: block.size])
        if exponents.max() == mask:
            wrong += int(np.count_nonzero(exponents == mask))
    return wrong

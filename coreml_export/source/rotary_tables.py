"""Rotary positions as tables of cosines and sines, taken from MLX's own module.

The module is applied to ones, so that every kind of scaling that mlx-lm has comes out as mlx-lm
computes it, scaled amplitudes (yarn) included.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .decoder_spec import Decoder


def tables(decoder: Decoder, context: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, sines) [context, rotated numbers / 2] in float32."""
    half = decoder.rope_dims // 2
    x = np.zeros((1, 1, context, decoder.head_dim), np.float32)
    if decoder.rope_traditional:
        x[..., 0 : decoder.rope_dims : 2] = 1
    else:
        x[..., :half] = 1
    y = np.array(decoder.rope(mx.array(x), offset=0).astype(mx.float32))[0, 0]
    if decoder.rope_traditional:
        return y[:, 0 : decoder.rope_dims : 2], y[:, 1 : decoder.rope_dims : 2]
    return y[:, :half], y[:, half : decoder.rope_dims]

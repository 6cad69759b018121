"""Windows of attention in families whose layers mlx-lm all gives the whole text.

mlx-lm makes one mask for all layers. A layer with a window makes its own here, from its own cache,
which keeps the last tokens only.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


def override_windows(model_class: type, window: int, layers: list[bool]) -> type:
    """A model class like the one given, some layers of which see the last ``window`` tokens only.

    Args:
        layers: for each layer, whether it has the window.
    """

    class Model(model_class):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            for layer, windowed in zip(self.layers, layers, strict=True):
                if windowed:
                    layer.__class__ = _windowed(type(layer), window)

        def make_cache(self) -> list[Any]:
            return [
                RotatingKVCache(max_size=window, keep=0) if windowed else KVCache()
                for windowed in layers
            ]

    return Model


@functools.cache
def _windowed(layer_class: type, window: int) -> type:
    """A decoder layer that looks back a window, whatever mask it is given."""

    class Windowed(layer_class):
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, *rest: Any) -> Any:
            array = isinstance(mask, mx.array)
            own = create_attention_mask(x, cache, window_size=window, return_array=array)
            return super().__call__(x, own, cache, *rest)

    Windowed.__name__ = Windowed.__qualname__ = layer_class.__name__
    Windowed.__module__ = layer_class.__module__
    return Windowed

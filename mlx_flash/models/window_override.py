"""Windows of attention in families whose layers mlx-lm all gives the whole text.

mlx-lm makes one mask for all layers, from the first one's cache. Every layer makes its own here, of
its own cache, which under a window keeps the last tokens only.
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
                layer.__class__ = _masked(type(layer), window if windowed else None)

        def make_cache(self) -> list[Any]:
            return [
                RotatingKVCache(max_size=window, keep=0) if windowed else KVCache()
                for windowed in layers
            ]

    return Model


@functools.cache
def _masked(layer_class: type, window: int | None) -> type:
    """A decoder layer that looks back a window, or at everything, whatever mask it is given."""

    class Masked(layer_class):
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, *rest: Any) -> Any:
            array = isinstance(mask, mx.array)
            own = create_attention_mask(x, cache, window_size=window, return_array=array)
            return super().__call__(x, own, cache, *rest)

    Masked.__name__ = Masked.__qualname__ = layer_class.__name__
    Masked.__module__ = layer_class.__module__
    return Masked

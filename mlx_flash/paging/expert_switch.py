"""Experts out of slots: mlx-lm's own switch module over the experts that are in memory.

The router is mlx-lm's and stays as it is; the experts that it chose are fetched, their numbers
become numbers of slots, and the switch module computes from the slots' arrays with its own kernels:
a token's numbers are the dense model's. Where more experts are wanted than there are slots, as in
a prompt, tokens are grouped by expert, and the experts pass through two buffers, each read once.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .counters import Counters
from .prefetch import Prefetcher
from .row_stream import RowStream
from .row_weights import bind_arrays
from .slots.row_cache import RowCache

# With at most this many tokens at a time the next layer's experts are prefetched, and experts in
# slots are computed before the others have come. More tokens ask for most experts anyway.
FEW_TOKENS = 4


class FlashSwitch(nn.Module):
    """mlx-lm's switch module of one layer, computed from slots.

    Args:
        switch: the module; its arrays are replaced.
        cache: the layer's slots.
        stream: for experts that find no slot, shared by all layers.
        counters: shared by all layers.

    Attributes:
        prefetcher: brings the next layer's experts; None for bringing none.
    """

    def __init__(
        self, switch: nn.Module, cache: RowCache, stream: RowStream, counters: Counters
    ) -> None:
        super().__init__()
        self.switch = switch
        self.layer = cache.layer
        self._cache, self._stream, self._counters = cache, stream, counters
        self.prefetcher: Prefetcher | None = None
        bind_arrays(switch, cache.slots.memory.arrays)

    def __call__(self, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        few = x.size // x.shape[-1] <= FEW_TOKENS
        predicted = self.prefetcher.predict(x) if self.prefetcher and few else None
        mx.eval(indices, *([] if predicted is None else [predicted]))
        chosen = np.array(indices, copy=False)
        wanted = np.unique(chosen)
        self._counters.predicted += wanted.size
        self._counters.layer_calls += 1
        if wanted.size > self._cache.slots.capacity:
            y = self._in_rounds(x, chosen, wanted, args, kwargs)
        else:
            y = self._from_slots(x, chosen, wanted, few, args, kwargs)
            self._cache.slots.retain_until_evaluated(y)
            mx.async_eval(y)
        if self.prefetcher:
            self.prefetcher.bring(predicted)
        return y

    def _from_slots(
        self, x: mx.array, chosen: np.ndarray, wanted: np.ndarray, few: bool, args: Any, kwargs: Any
    ) -> mx.array:
        """Of few tokens, what slots hold is computed while the rest is read."""
        cache = self._cache
        with cache.invalidate_on_error():
            loading = cache.begin(wanted)
            bind_arrays(self.switch, cache.slots.memory.arrays)
            slots = cache.slots.slots_of(chosen).astype(np.uint32)
            late = np.isin(chosen, loading)
            if not few or late.all() or not late.any():
                cache.finish()
                return self.switch(x, mx.array(slots), *args, **kwargs)
            here = self._of_pairs(x, slots, ~late, args, kwargs)
            mx.async_eval(here)
            cache.finish()
        rest = self._of_pairs(x, slots, late, args, kwargs)
        order = np.concatenate([np.flatnonzero(~late), np.flatnonzero(late)])
        return _in_order([here, rest], order, chosen.shape)

    def _of_pairs(
        self, x: mx.array, slots: np.ndarray, mask: np.ndarray, args: Any, kwargs: Any
    ) -> mx.array:
        """Outputs of some pairs of a token and an expert, [n, width].

        Args:
            slots: of the experts of each token, [..., experts per token].
            mask: which pairs, of the same shape.
        """
        tokens = x.reshape(-1, x.shape[-1])
        token = np.flatnonzero(mask) // slots.shape[-1]
        index = mx.array(slots[mask][:, None])
        return self.switch(tokens[mx.array(token)], index, *args, **kwargs).squeeze(-2)

    def _in_rounds(
        self, x: mx.array, chosen: np.ndarray, wanted: np.ndarray, args: Any, kwargs: Any
    ) -> mx.array:
        """The tokens of some experts after those of others, put in order at the end."""
        tokens, pairs = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        outputs, order = [], []
        for experts, arrays in self._stream.stream_chunks(self.layer, wanted, self._cache):
            token, choice = np.nonzero(np.isin(pairs, experts))
            slots = np.searchsorted(experts, pairs[token, choice]).astype(np.uint32)
            bind_arrays(self.switch, arrays)
            y = self.switch(tokens[mx.array(token)], mx.array(slots[:, None]), *args, **kwargs)
            self._stream.retain_until_evaluated(y)
            outputs.append(y.squeeze(-2))
            order.append(token * pairs.shape[1] + choice)
        return _in_order(outputs, np.concatenate(order), chosen.shape)


def _in_order(outputs: list[mx.array], order: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    """Outputs [n, width] in pieces, put at the places that ``order`` names: [*shape, width]."""
    y = mx.concatenate(outputs)[mx.array(np.argsort(order, kind="stable"))]
    return y.reshape(*shape, y.shape[-1])

"""A row is a whole layer's FFN."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.models import families
from mlx_flash.paging.layer_stream import LayerStream
from mlx_flash.paging.row_weights import first_row, whole_layer
from mlx_flash.paging.streamed_ffn import FlashLayer

from ..memory_requirements import BUFFERS
from .base import BasePager


class LayerPager(BasePager):
    """A row is a layer's FFN as mlx-lm holds it: layers are kept or streamed whole."""

    partial = False

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """See ``Pager``."""
        return self._check(families.modules(model, self.directory.ffn))

    def kept(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        return first_row(whole_layer(self.reader, layer))

    def missing(self, layer: int) -> dict[str, mx.array]:
        """See ``Pager``."""
        return {part: zeros.squeeze(0) for part, zeros in self._placeholders(layer).items()}

    def start(self) -> dict[str, nn.Module]:
        """See ``Pager``."""
        if not self.plan.streamed:
            return {}
        self.stream = LayerStream(
            self.reader, self.plan.streamed, BUFFERS, unpadded=True, counters=self.counters
        )
        return {
            self.found[i][0]: FlashLayer(self.found[i][1], i, self.stream)
            for i in self.plan.streamed
        }

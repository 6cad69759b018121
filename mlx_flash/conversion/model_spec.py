"""Where a model has its FFNs: worked out once from its config, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_flash.model_directory.config import locate_ffn
from mlx_flash.models import families, mixtures
from mlx_flash.models.families import Ffn
from mlx_flash.models.mixtures import Mixture
from mlx_flash.models.registry import make_model


@dataclass(frozen=True)
class ModelSpec:
    """What the row plan has to know of a model.

    Args:
        ffn: entry of a dense family; None for a mixture.
        mixture: entry of a mixture; None for a dense family.
        modules: dotted path of every FFN (of a mixture: every switch module), layer by layer ->
            how many experts it has; 0 in a dense model.
        parameters: how many numbers the model has before any quantisation.
    """

    ffn: Ffn | None
    mixture: Mixture | None
    modules: dict[str, int]
    parameters: int

    @classmethod
    def of(cls, config: dict[str, Any], path: Path) -> ModelSpec:
        """The spec of a config's model.

        Args:
            path: what errors name.

        Raises:
            ModelError: the family is unknown, or its table does not fit mlx-lm's model.
        """
        return cls.of_model(make_model(config), *locate_ffn(config, path))

    @classmethod
    def of_model(cls, model: nn.Module, ffn: Ffn | None, mixture: Mixture | None) -> ModelSpec:
        """The same where mlx-lm's model and the table's entry are at hand.

        Args:
            model: as ``make_model`` made it, not quantised yet.
        """
        if mixture:
            modules = mixtures.counts_of(mixtures.modules(model, mixture), mixture)
        elif ffn:
            modules = {path: 0 for path, _ in families.modules(model, ffn)}
        else:
            raise ValueError("neither an FFN nor a mixture is given")
        return cls(ffn, mixture, modules, sum(a.size for _, a in tree_flatten(model.parameters())))

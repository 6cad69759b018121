"""Which classes make a config's model: the decoders of ``models``, or mlx-lm's own.

Knows: the families that mlx-lm lacks. Does not know: what is done with the classes.
"""

from __future__ import annotations

import importlib
from typing import Any

from mlx_lm import utils

OWN = ("falcon", "opt", "persimmon")  # modules of ``models``


def get_classes(config: dict[str, Any]) -> tuple[type, type]:
    """(model class, arguments class); what mlx-lm's ``load_model`` takes as ``get_model_classes``.

    Raises:
        ValueError: neither has the config's ``model_type``.
    """
    model_type = config["model_type"]
    if model_type in OWN:
        module = importlib.import_module(f".models.{model_type}", __package__)
        return module.Model, module.ModelArgs
    return utils._get_classes(config)

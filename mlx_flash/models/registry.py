"""Which classes make a config's model: the decoders of ``models``, or mlx-lm's own.

Knows: the families that mlx-lm lacks or computes wrongly. Does not know: what is done with the
classes.
"""

from __future__ import annotations

import importlib
from typing import Any

from mlx_lm import utils

from . import families
from .activation_override import refit

# model_type -> module of ``models``.
OWN = {
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "bamboo": "bamboo",
    "bypass_llama": "bypass_llama",
    "falcon": "falcon",
    "minicpm": "minicpm",
    "opt": "opt",
    "persimmon": "persimmon",
}
INVENTED = ("bypass_llama",)  # which transformers has never heard of
RUNS_AS = {"sparsellama": "llama"}  # model_type -> that of mlx-lm
REFITTED = {"mistral": "bamboo"}  # the same as OWN, where the activation is not mlx-lm's


def get_classes(config: dict[str, Any]) -> tuple[type, type]:
    """(model class, arguments class); what mlx-lm's ``load_model`` takes as ``get_model_classes``.

    Raises:
        ValueError: neither has the config's ``model_type``.
        ModelError: the config names an activation that is not known.
    """
    model_type = config["model_type"]
    module, known = OWN.get(model_type), families.FAMILIES.get(model_type)
    ffn = families.find(config) if known and known.built_in else None
    if ffn is None or not ffn.refitted:
        return _classes(config, module)
    return refit(*_classes(config, module or REFITTED.get(model_type)), ffn)


def make_model(config: dict[str, Any]) -> Any:
    """An instance of a config's model, its weights random and never evaluated."""
    model_class, args_class = get_classes(config)
    return model_class(args_class.from_dict(config))


def _classes(config: dict[str, Any], module: str | None) -> tuple[type, type]:
    if module:
        found = importlib.import_module(f"mlx_flash.models.decoders.{module}")
        return found.Model, found.ModelArgs
    model_type = config["model_type"]
    return utils._get_classes(config | {"model_type": RUNS_AS.get(model_type, model_type)})

"""Which classes make the model of a config: a decoder of this package, or mlx-lm's own.

A file in ``decoders`` says for itself what it is for, so that a new one needs no entry here:

    MODEL_TYPES      the ``model_type`` of configs that it makes
    OVERRIDE_TYPES   those that it makes where the activation is not the one mlx-lm computes
    IN_TRANSFORMERS  False where transformers has no such model
    FOLLOWS_SETTINGS True where it is mlx-lm's model with little changed, so that rotary positions
                     and windows that mlx-lm leaves out are put in as for mlx-lm's own
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mlx_lm import utils

from . import decoders, families
from .activation_override import override_activation
from .group_override import has_groups, override_groups
from .rope_override import needs_override, override_rope
from .settings.normalise import settle
from .settings.table import rules_of
from .settings.windows import windowed_layers
from .window_override import override_windows

MODULES: list[ModuleType] = [
    importlib.import_module(f"{decoders.__name__}.{entry.name}")
    for entry in pkgutil.iter_modules(decoders.__path__)
]


def _by_type(attribute: str) -> dict[str, ModuleType]:
    """model_type -> decoder module, as the modules say under an attribute."""
    return {
        model_type: module for module in MODULES for model_type in getattr(module, attribute, ())
    }


DECODERS = _by_type("MODEL_TYPES")
OVERRIDE_DECODERS = DECODERS | _by_type("OVERRIDE_TYPES")
RUNS_AS = {"sparsellama": "llama"}  # model_type -> that of mlx-lm


def in_transformers(model_type: str | None) -> bool:
    """Whether transformers has a model of this type, too; True for what is unknown here."""
    return getattr(DECODERS.get(model_type or ""), "IN_TRANSFORMERS", True)


def get_classes(config: dict[str, Any]) -> tuple[type, type]:
    """(model class, arguments class); what mlx-lm's ``load_model`` takes as ``get_model_classes``.

    The arguments class reads a config as ``settle`` writes it, whichever spelling it is given.

    Raises:
        ValueError: neither this package nor mlx-lm has the config's ``model_type``.
        ModelError: the config names an activation that is not known, or has a setting that is not
            computed.
    """
    settled = settle(config)
    model_class, args_class = _with_overrides(settled)
    if settled is config:
        return model_class, args_class

    class ModelArgs(args_class):
        @classmethod
        def from_dict(cls, params: Mapping[str, Any]) -> Any:
            return super().from_dict(settle(dict(params)))

    return model_class, ModelArgs


def _with_overrides(config: dict[str, Any]) -> tuple[type, type]:
    """The classes of a settled config, with what mlx-lm lacks put in."""
    classes = _with_activation(config)
    text = config.get("text_config")
    text = config | text if isinstance(text, dict) else config
    rules = rules_of(text) if _follows_settings(classes[0]) else None
    if rules and rules.rope and needs_override(text, rules.rope):
        classes = override_rope(*classes, text, rules.rope)
    if rules and rules.native_window is None and (windows := windowed_layers(text, rules)):
        classes = override_windows(classes[0], *windows), classes[1]
    if has_groups(text):
        classes = override_groups(classes[0]), classes[1]
    return classes


def _follows_settings(model_class: type) -> bool:
    """Whether rotary positions and windows are to be put in where mlx-lm leaves them out."""
    modules = {module.__name__: module for module in MODULES}
    return all(
        getattr(modules[base.__module__], "FOLLOWS_SETTINGS", False)
        for base in model_class.__mro__
        if base.__module__ in modules
    )


def _with_activation(config: dict[str, Any]) -> tuple[type, type]:
    model_type = config["model_type"]
    known = families.FAMILIES.get(model_type)
    ffn = families.find(config) if known and known.built_in else None
    if ffn is None or not ffn.overridden:
        return _classes(config, DECODERS.get(model_type))
    return override_activation(*_classes(config, OVERRIDE_DECODERS.get(model_type)), ffn)


def make_model(config: dict[str, Any]) -> Any:
    """An instance of a config's model, its weights random and never evaluated."""
    model_class, args_class = get_classes(config)
    return model_class(args_class.from_dict(config))


def _classes(config: dict[str, Any], decoder: ModuleType | None) -> tuple[type, type]:
    if decoder:
        return decoder.Model, decoder.ModelArgs
    model_type = config["model_type"]
    return utils._get_classes(config | {"model_type": RUNS_AS.get(model_type, model_type)})

"""Every key that a family's config has in transformers is computed, harmless or refused."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlx_flash.models import families, mixtures, registry
from mlx_flash.models.settings import table

FAMILIES = sorted(
    name for name in {*families.FAMILIES, *mixtures.MIXTURES} if name in CONFIG_MAPPING
)


def text_config(model_type: str) -> dict[str, Any]:
    """transformers' defaults of a family's text model."""
    config = CONFIG_MAPPING[model_type]()
    return (getattr(config, "text_config", None) or config).to_dict()


def used(args_class: type) -> set[str]:
    """Fields of an arguments class that its module, or a base's, reads somewhere."""
    found = set()
    for base in args_class.__mro__:
        file = getattr(sys.modules[base.__module__], "__file__", None)
        if file and base is not object:
            with open(file, encoding="utf-8") as source:
                tree = ast.parse(source.read())
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            found |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return found & inspect.signature(args_class).parameters.keys()


def text_args(model_type: str) -> type:
    """The class of mlx-lm that reads a family's text model."""
    model_class, args_class = registry.get_classes({"model_type": model_type})
    module = sys.modules[model_class.__module__]
    for name in ("TextArgs", "TextModelArgs", "TextConfig"):
        if hasattr(module, name):
            return getattr(module, name)
    return args_class


def unplaced(model_type: str) -> list[str]:
    keys = text_config(model_type)
    found = used(text_args(model_type))
    return [key for key in keys if table.place(model_type, key, found) is None]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_has_a_place(model_type):
    assert unplaced(model_type) == []

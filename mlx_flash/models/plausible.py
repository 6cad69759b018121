"""Sizes in a config, held against the files that it comes with, before a model is made of it.

A model's class makes an object for every layer that its config counts, whatever the files hold:
300,000 layers take a minute and 5 GB. So numbers of layers and widths that the tensors cannot bear
out are refused first. The bounds are wide: what is wrong by less is found, and told exactly, when
tensors are compared with the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlx_flash.common.json_reader import show
from mlx_flash.errors import ModelError

MOST_LAYERS = 4096  # of any model; those that are published have up to 200
MOST = 2**31 - 1  # of any other size: MLX counts an axis in 32 bits
TIMES = 32  # how often larger than the longest axis a size may be: packed numbers, products

# Not max_window_layers and the like: the number of a layer, which may lie beyond the last.
_LAYERS = re.compile(r"^(?!max_|.*every_)(.*_)?(layers?|loop_num|loops)$")
_SIZES = re.compile(
    r"^(num|n)_|(^|_)(num|size|dim|heads?|rank|experts?|embd|inner|width|channels|groups|state)(_|$)"
)
_OTHERS = re.compile(r"position|length|ctx|window|chunk|batch|block|patch|image|token|param|kernel")


def check_counts(config: Mapping[str, Any]) -> None:
    """Raise ModelError for sizes that no model has, whatever its files hold."""
    for key, value in _numbers(config):
        if _LAYERS.search(key) and value > MOST_LAYERS:
            raise ModelError(
                f"{key} in config.json is {show(value)}, expected at most {MOST_LAYERS:,} layers"
            )
        if _is_size(key) and value > MOST:
            raise ModelError(f"{key} in config.json is {show(value)}, expected at most {MOST:,}")


def check_sizes(config: Mapping[str, Any], shapes: Iterable[Sequence[int]]) -> None:
    """Raise ModelError for sizes that the tensors of a model do not bear out.

    Args:
        shapes: of all tensors in the files.
    """
    check_counts(config)
    shapes = list(shapes)
    longest = max((n for shape in shapes for n in shape), default=0)
    for key, value in _numbers(config):
        if _LAYERS.search(key) and value > len(shapes):
            raise ModelError(
                f"{key} in config.json is {value}, but the weights are {len(shapes)} tensors; "
                "expected the config.json of these weights"
            )
        if _is_size(key) and value > TIMES * longest:
            raise ModelError(
                f"{key} in config.json is {value}, but no tensor of the weights is longer than "
                f"{longest}; expected the config.json of these weights"
            )


def _is_size(key: str) -> bool:
    return bool(_SIZES.search(key)) and not _OTHERS.search(key) and not _LAYERS.search(key)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers of a config and of its text model's."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key, value in part.items():
            if type(value) is int:
                yield key, value

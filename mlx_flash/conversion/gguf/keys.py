"""Typed access to the keys of one architecture in a GGUF's metadata, and which were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_flash.errors import ModelError

from .header import some

LARGEST = 2**32 - 1
# Keys that say nothing about what a model computes.
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
# Keys that are factors, so that 1 is no change.
FACTORS = ("scale", "factor", "group_count", "group_used_count", "scale_linear")


class Keys:
    """The keys ``ARCH.name`` of a file's metadata, by name.

    Args:
        meta: all metadata.
        arch: the file's architecture, which begins the keys.
    """

    def __init__(self, meta: Mapping[str, Any], arch: str) -> None:
        self.arch = arch
        self._meta, self._asked = meta, set[str]()

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands in the file."""
        self._asked.add(name)
        return self._meta.get(f"{self.arch}.{name}", default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; a list of one repeated value counts as that value."""
        value = self.get(name, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        good = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST
        if not good:
            shown = "missing" if value is None else f"{value!r:.60}"
            raise ModelError(f"{self.arch}.{name} is {shown}; expected one positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive float as it was before float32 rounded it (1e-05, not 9.99999974e-06)."""
        value = self.get(name, default)
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not 0 < value < 1e30:
            raise ModelError(f"{self.arch}.{name} is {value!r:.60}; expected a positive number")
        return shortest(value)

    def refuse_rest(self, implied: Mapping[str, Any]) -> None:
        """ModelError for keys that nobody asked for and that may change what is computed.

        Args:
            implied: by name, values that are what the model computes anyway.
        """
        start = f"{self.arch}."
        rest = {
            key: value
            for key, value in self._meta.items()
            if key.startswith(start) and key.removeprefix(start) not in {*self._asked, *HARMLESS}
        }
        odd = [
            f"{key} = {value!r:.60}"
            for key, value in rest.items()
            if value != implied.get(key.removeprefix(start), _neutral(key))
            and value not in (0, False, "", [])
        ]
        if odd:
            raise ModelError(
                f"settings that this version cannot honour: {some(odd)}; convert the model's "
                "Hugging Face checkpoint instead, if it is known"
            )


def _neutral(key: str) -> Any:
    return 1 if key.endswith(FACTORS) else 0


def shortest(value: float) -> float:
    """The shortest decimal that float32 rounds to the same number."""
    return float(str(np.float32(value)))

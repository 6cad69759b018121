"""Core ML's own prediction behind the interpreter's interface; macOS only.

It has not been run yet: nothing of this project was on a Mac.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coreml_export.bundle import manifest
from coreml_export.errors import ExportError
from coreml_export.program.coremltools_compat import ct


def require_macos() -> None:
    """Raise ExportError where Core ML cannot run."""
    if platform.system() != "Darwin":
        raise ExportError(
            "Core ML's own prediction runs on macOS only; here --verify checks the program with "
            "the interpreter. Copy the export to a Mac with macOS 15 or later and run there: "
            "python -m coreml_export MODEL --check OUT --coreml"
        )


class DevicePackage:
    """A package run by Core ML; the interface of ``interpreter.Package``."""

    def __init__(self, path: Path) -> None:
        require_macos()
        self.path = path
        self._signatures = manifest.functions(path)
        self._loaded: dict[str, _DeviceFunction] = {}

    def function(self, name: str) -> _DeviceFunction:
        """A function, compiled by Core ML when first asked for."""
        if name not in self._loaded:
            model = ct.models.MLModel(str(self.path), function_name=name)
            self._loaded[name] = _DeviceFunction(model, self._signatures[name])
        return self._loaded[name]


class _DeviceFunction:
    def __init__(self, model: Any, signature: dict[str, Any]) -> None:
        self._model = model
        self.inputs = {
            name: (tuple(entry["shape"]), np.dtype(entry["dtype"]))
            for name, entry in signature["inputs"].items()
        }
        self.states = {name: tuple(e["shape"]) for name, e in signature["states"].items()}

    def new_state(self) -> Any:
        return self._model.make_state()

    def __call__(self, inputs: Mapping[str, np.ndarray], state: Any = None) -> dict[str, Any]:
        given = dict(inputs)
        return (
            self._model.predict(given, state=state) if self.states else self._model.predict(given)
        )

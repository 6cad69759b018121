"""The table of kinds: what it names exists, and reading it takes no MLX."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_flash.predictors import registry
from mlx_flash.predictors.predictor_file import LayerPredictor
from mlx_flash.predictors.registry import KINDS

CHOICES = """
import sys
from mlx_flash.predictors import registry
print(*registry.names(), "mlx" in sys.modules or "numpy" in sys.modules)
"""


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_an_entry_names_is_there(kind):
    assert callable(registry.load(kind.build))
    assert callable(registry.load(kind.coreml))
    if kind.training:
        assert callable(registry.load(kind.training.fitter))
        names = kind.training.tensors.keys()
        assert {*kind.training.needed, *kind.training.together} <= names
        assert kind.training.target in ("target_recall", "sparsity")
        assert kind.training.column in LayerPredictor.__annotations__ or hasattr(
            LayerPredictor, kind.training.column
        )


def test_names_of_kinds():
    assert registry.names() == ("auto", "none", "gate", "up", "low-rank", "threshold")
    assert registry.fitted() == ("low-rank", "threshold") == tuple(registry.trained())


def test_the_command_line_can_ask_without_mlx():
    found = subprocess.run([sys.executable, "-c", CHOICES], capture_output=True, text=True)
    assert found.stdout.split() == [*registry.names(), "False"], found.stderr

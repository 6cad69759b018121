"""The tests' own makers of tiny models, for benchmarks that need one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parents[2] / "tests"


def from_tests(name: str) -> ModuleType:
    """A module of ``tests/support`` by its name there; pytest imports them the same way."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module(f"support.{name}")


def write_tokenizer(path: Path, size: int) -> None:
    """A byte-level BPE tokenizer of ``size`` tokens in a checkpoint's folder."""
    from_tests("tiny").write_tokenizer(path, size)

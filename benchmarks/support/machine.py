"""Where benchmarks put what they make, and the machine that they run on."""

from __future__ import annotations

from pathlib import Path

from mlx_flash.common.user_cache import machine_name

__all__ = ["OUT", "ROOT", "machine_name"]

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "out"

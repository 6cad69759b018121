"""Model directories of the benchmarks: made the first time, taken as they are from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from demos.smollm2 import smollm2_gguf
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory

from .machine import OUT


def converted(
    name: str, source: Path | Callable[[Path], Path], **options: object
) -> ModelDirectory:
    """The directory ``name`` in ``OUT``.

    Args:
        source: checkpoint, or what makes one in a folder of that name.
        options: keywords of ``convert``.
    """
    path = OUT / name
    if not path.exists():
        found = source if isinstance(source, Path) else source(OUT / f"{name}-source")
        convert(found, path, **options)
    return ModelDirectory(path)


def smollm2(dtype: str, adapter: str | None = None) -> ModelDirectory:
    """SmolLM2-135M in floats, with an adapter or as it is."""
    name = "-".join(["smollm2", *([adapter] if adapter else []), dtype])
    return converted(name, smollm2_gguf(), dtype=dtype, dequantize=True, adapter=adapter)

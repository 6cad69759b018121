"""Run language models larger than memory: FFN rows stay on flash, mlx-lm does the rest."""

from typing import TYPE_CHECKING, Any

from .errors import FlashError

if TYPE_CHECKING:
    from mlx_flash.conversion.convert import convert
    from mlx_flash.runtime.load import load

__version__ = "0.1.0"
__all__ = ["FlashError", "__version__", "convert", "load"]


def __getattr__(name: str) -> Any:
    """``load`` and ``convert`` on first use: they import mlx_lm, which storage alone need not."""
    if name == "load":
        from mlx_flash.runtime.load import load

        return load
    if name == "convert":
        from mlx_flash.conversion.convert import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

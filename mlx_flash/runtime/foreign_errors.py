"""Errors of other libraries' code, told as errors of the files that it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_flash.errors import FlashError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory

LINES, CHARACTERS = 3, 500  # of another library's error that are shown


@contextmanager
def foreign_errors(
    directory: ModelDirectory, what: str = "its config.json or weights"
) -> Iterator[None]:
    """Turn any error of mlx-lm's code, which these files drive, into one that names them."""
    try:
        yield
    except (FlashError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{directory.path} cannot be loaded, {what} were changed: "
            f"{type(error).__name__}: {_first_lines(error)}; convert the model again"
        ) from error


def _first_lines(error: Exception) -> str:
    """What an error says, without what some of them list: every tensor, every key."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[:LINES])[:CHARACTERS] + (", ..." if len(lines) > LINES else "")

"""A model that runs over a text inside a RAM budget, for whoever records what it does."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import show
from mlx_flash.errors import BudgetError, CalibrationError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.cache_limit import MLX_CACHE
from mlx_flash.runtime.load import load_model, load_tokenizer
from mlx_flash.runtime.options import PagingOptions

from . import text as text_module
from .text import CalibrationText

Progress = Callable[[str, int, int], Any]  # told (stage, done, total)


class TextRun:
    """One run; kinds of runs subclass it and give it a ``name`` for errors.

    Args:
        directory: the model's.
        text: to run over.
        work: working directory, from ``recordings.working_directory``.
        ram: bytes that the whole process may take; None for no limit.
        progress: called as (stage, done, total).
    """

    name = "running over text"

    def __init__(
        self,
        directory: ModelDirectory,
        text: CalibrationText,
        work: Path,
        ram: int | None,
        progress: Progress | None,
    ) -> None:
        self.directory, self.text, self.work, self.ram = directory, text, work, ram
        self.progress: Progress = progress or (lambda *_: None)
        self.seconds: dict[str, float] = {}  # that stages took

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Keep how long a stage took."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 2)

    @contextmanager
    def model(self, reserve: int = 0, purpose: str = "", **options: Any) -> Iterator[nn.Module]:
        """The exact model, gone from memory at the end.

        Args:
            reserve: bytes of the budget that loading leaves free.
            purpose: what they are for, for the error.
            options: see ``PagingOptions``.

        Raises:
            BudgetError: the rest of the budget is too small.
        """
        ram = None if self.ram is None else max(1, self.ram - reserve)
        paging = PagingOptions(ram=ram, context=self.text.length, predictor="none", **options)
        gc.collect()
        try:
            model = load_model(self.directory, paging)
        except BudgetError as error:
            if not reserve:
                raise
            raise BudgetError(
                f"{self.name} takes {show(reserve)} of the RAM budget for {purpose}; with the "
                f"rest: {error}"
            ) from error
        try:
            yield model
        finally:
            model.flash.close()
            del model
            release()


def release() -> None:
    """Give back what a closed model held: its FFNs know each other, so only a collection does."""
    gc.collect()
    mx.clear_cache()
    current_platform().trim()


@contextmanager
def small_cache(ram: int | None) -> Iterator[None]:
    """Have MLX keep little of what it frees while there is a budget."""
    limit = mx.set_cache_limit(MLX_CACHE) if ram is not None else None
    try:
        yield
    finally:
        if limit is not None:
            mx.set_cache_limit(limit)


def check_writable(directory: ModelDirectory, what: str) -> None:
    """Raise CalibrationError where nothing can be written into a model directory."""
    if not os.access(directory.path, os.W_OK | os.X_OK):
        raise CalibrationError(f"no permission to write in {directory.path}; {what} go there")


def tokenised(
    directory: ModelDirectory, data: str | Path | None, tokens: int, seed: int
) -> CalibrationText:
    """A text as a model's tokenizer cuts it, see ``text.load``."""
    tokenizer = load_tokenizer(directory)
    return text_module.load(data, tokenizer, tokens, directory.positions, seed)

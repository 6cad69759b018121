"""Every error a user can cause or meet, under one base class.

A message names what was found, what was expected and what to do. The command line prints the
message alone and exits with ``exit_code``: 2 for a request that cannot be carried out, 1 for damage
(data that was good once, or a disk that fails).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FlashError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 2


class ModelError(FlashError, ValueError):
    """A checkpoint, config or model directory that is missing, unknown or contradicts itself."""


class RowFileError(FlashError, ValueError):
    """A row file that is foreign, of another version, or of another model."""


class DamagedError(FlashError):
    """Data that does not match its recorded size or hash."""

    exit_code = 1


class ReadError(FlashError, OSError):
    """The disk failed while rows were read; names path, layer, row and offset."""

    exit_code = 1


class BudgetError(FlashError, ValueError):
    """A RAM budget that is no size, too small, or larger than the machine."""


class ConvertError(FlashError):
    """Conversion cannot start or go on: output exists, disk too small, output not writable."""


class CacheError(FlashError, ValueError):
    """A request that a row cache cannot serve, such as more rows at once than slots."""


class ClosedError(FlashError, ValueError):
    """Use of a model, or of its reader, after it was closed, or in a process forked since."""


class PredictorError(FlashError, ValueError):
    """A predictor that is missing, damaged, or made for another model."""


class CalibrationError(FlashError, ValueError):
    """Calibration cannot start or go on: its text, its settings, or a result that is not finite."""


class FlashWarning(UserWarning):
    """Something was wrong and has been dealt with, at a cost that the user should know of."""


class UsageError(FlashError):
    """Arguments of a command that contradict themselves."""


@contextmanager
def naming(path: Path, *kinds: type[FlashError]) -> Iterator[None]:
    """Errors of some kinds that are raised inside begin with a path, unless they have it."""
    try:
        yield
    except kinds as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error

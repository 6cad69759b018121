"""Errors of the export; see ``mlx_flash.errors`` for what a message has to say."""

from mlx_flash.errors import FlashError


class ExportError(FlashError):
    """An export cannot start: the model, the target or the output does not allow it."""


class ParityError(FlashError):
    """What was exported does not compute what the model computes."""

    exit_code = 1

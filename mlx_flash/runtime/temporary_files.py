"""Where MLX compiles its CPU kernels: a folder that has to be there, with some room."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mlx_flash.common.files import FULL
from mlx_flash.errors import ModelError

VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # in the order in which C++ asks for them
ROOM = 1 << 20  # bytes that a kernel, its source and what the compiler leaves beside it may take


def check_temporary() -> None:
    """Raise ModelError where MLX will not be able to compile a kernel, which it does late."""
    named = next((name for name in VARIABLES if os.environ.get(name)), None)
    folder = Path(os.environ[named]) if named else Path("/tmp")
    advice = f"set {named or 'TMPDIR'} to a folder that can be written"
    if not folder.is_dir():
        raise ModelError(
            f"{named or 'the temporary folder'} is {folder}, which is no directory; MLX compiles "
            f"its kernels there: {advice}"
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(bytes(ROOM))
            f.flush()
    except OSError as error:
        room = "make room, or " if error.errno in FULL else ""
        raise ModelError(
            f"{folder} cannot be written: {error.strerror}; MLX compiles its kernels there: "
            f"{room}{advice}"
        ) from error

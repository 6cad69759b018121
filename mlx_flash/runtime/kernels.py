"""Kernels that MLX's CPU back end compiles the first time that it needs them, and keeps as files.

The compiler is a process of its own that takes up to 150 MB. It is run, if at all, before a budget
is planned, so that it does not come on top of a model that is in memory by then.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from mlx_flash.common.files import FULL
from mlx_flash.errors import ModelError
from mlx_flash.models.activations import FUNCTIONS

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
        if error.errno == errno.EFBIG:  # a limit on any file of this process (ulimit -f)
            return
        room = "make room, or " if error.errno in FULL else ""
        raise ModelError(
            f"{folder} cannot be written: {error.strerror}; MLX compiles its kernels there: "
            f"{room}{advice}"
        ) from error


def compile_first(activation: str, dtype: mx.Dtype) -> None:
    """Have the kernels of a model's FFN compiled, if they are not yet.

    Args:
        activation: a name in ``FUNCTIONS``; "" and others are of mixtures, most of which have
            gated FFNs with silu, or have parameters of their own.
        dtype: that the model computes in.
    """
    x = mx.ones((1, 1, 64), dtype)
    function = FUNCTIONS.get(activation)
    mx.eval(swiglu(x, x) if activation in ("silu", "") else function(x) if function else x)

"""How many files this process may open, before mlx-lm asks for more.

mlx-lm sets both limits when it is imported, for models of many files; where the system does not
allow that its import ends in a traceback. The same is asked for here first.
"""

from __future__ import annotations

import resource
import sys

from mlx_flash.errors import FlashError

SOFT, HARD = 2048, 4096  # as in mlx_lm.utils


def check_open_files() -> None:
    """Raise FlashError where mlx-lm could not be imported for want of files."""
    if "mlx_lm.utils" in sys.modules:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, HARD))
    except (ValueError, OSError) as error:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise FlashError(
            f"a process may open {hard} files here (the hard limit), and mlx-lm needs {HARD}; "
            f"raise it where this process is started, as root: ulimit -Hn {HARD}; "
            f"LimitNOFILE={HARD} in a systemd unit; docker run --ulimit nofile={HARD}"
        ) from error

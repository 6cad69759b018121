"""Load a model inside a RAM budget.

Read ``memory_plan`` (what a budget buys), ``pagers`` (what is put in place), ``load``.

Knows: mlx-lm's loading contract. Does not know: text, the command line.
"""

from mlx_flash.common.open_files import check_open_files

check_open_files()  # before anything here imports mlx_lm

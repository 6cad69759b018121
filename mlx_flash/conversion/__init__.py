"""A checkpoint becomes a model directory.

Read ``checkpoint`` (what a source is), ``open_checkpoint``, ``row_plan`` (what becomes a row), then
``convert``.

Knows: checkpoints, row files. Does not know: how a model is run.
"""

from mlx_flash.common.open_files import check_open_files

check_open_files()  # before anything here imports mlx_lm

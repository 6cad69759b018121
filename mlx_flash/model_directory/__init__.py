"""The format on disk that conversion writes and everything else reads (docs/model_directory.md).

Knows: files and their hashes. Does not know: how they are made, how they are used.
"""

from mlx_flash.common.open_files import check_open_files

check_open_files()  # before anything here imports mlx_lm

"""Which model families there are, and where in their modules the FFN is.

Read ``families`` first, then ``mixtures`` and ``registry``. Decoders that mlx-lm lacks are in
``decoders``.

Knows: mlx-lm's modules. Does not know: files, paging, budgets.
"""

from mlx_flash.common.open_files import check_open_files

check_open_files()  # before anything here imports mlx_lm

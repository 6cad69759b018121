"""Which model families there are, and where in their modules the FFN is.

Read ``families`` first, then ``mixtures`` and ``registry``. Decoders that mlx-lm lacks are in
``decoders``.

Knows: mlx-lm's modules. Does not know: files, paging, budgets.
"""

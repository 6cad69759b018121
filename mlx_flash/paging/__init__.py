"""What runs in the place of an FFN: rows come from flash into memory and are computed from there.

Read ``slots`` (rows of one layer in memory), ``row_stream`` (rows on their way through buffers),
``gather_strategies`` and ``sparse_ffn`` (neurons), ``expert_switch`` (experts), ``layer_stream``
and ``streamed_ffn`` (whole layers). ``policies`` say which rows leave, ``simulate`` counts what
that costs, ``prefetch`` brings rows before their turn.

**State in modules.** The modules here compute with mlx-lm's own, whose calls take hidden states and
no weights. So before each call the rows are bound to the module (``RowLinear.bind``,
``bind_arrays``), and buffers and slots hold the rows of one forward pass. A paged model cannot be
called again while a call runs; ``PagedModel`` therefore lets one call run at a time, under a lock.

Knows: one layer at a time. Does not know: budgets, how a model is loaded.
"""

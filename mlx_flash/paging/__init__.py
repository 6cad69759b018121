"""What runs in the place of an FFN: rows come from flash into slots and are computed from there.

Read ``slot_memory``, ``slot_table``, ``row_cache``, ``row_stream``, then ``sparse_ffn`` (neurons),
``expert_switch`` (experts) and ``streamed_ffn`` (whole layers).

Knows: one layer at a time. Does not know: budgets, how a model is loaded.
"""

"""Slots: memory for some rows of one layer, and the reads that fill it.

Read ``slot_memory`` (the bytes), ``slot_table`` (which row is in which slot), then ``row_cache``.

Knows: rows, slots, the reader. Does not know: what is computed from slots, how rows are chosen.
"""

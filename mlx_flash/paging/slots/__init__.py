"""Slots: memory for some rows of one layer, and the reads that fill it.

Read ``slot_memory`` (the bytes), ``slot_table`` (which row is in which slot), ``slot_store`` (both,
and what still reads them), ``pending_reads`` (what still writes to them), ``row_cache`` (all of it
in the right order).

Knows: rows, slots, the reader. Does not know: what is computed from slots, how rows are chosen.
"""

"""What is put in place of a model's FFNs, one pager for each unit of rows.

A pager says where the FFNs are, which weights they are loaded with, and which modules stand in for
those whose rows are not kept. Kept layers are mlx-lm's own modules with weights read from the row
file. Read ``base``, then ``layers`` (the simplest), ``neurons``, ``experts``.

Knows: one model directory, its plan. Does not know: how a model is loaded or called.
"""

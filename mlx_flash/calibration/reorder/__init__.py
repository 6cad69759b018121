"""Rows that are needed together, written near each other, so that fewer requests read them.

Read ``access_trace`` (which rows each token needs), ``ordering`` (an order of rows from that),
``resident_tensors`` (weights in memory that have a number for each row), ``rewriting`` (a whole
model directory in another order) and ``reorder``, the order of work.

Knows: rows of a model directory, everything in it that counts them. Does not know: how predictors
are fitted.
"""

"""What is learned from text: predictors, demand for experts, orders of rows.

Knows: running a model over text. Does not know: how fast anything is.
"""

"""Which rows fire: predictors, their file, and which of them a model runs with.

Knows: hidden states and rows. Does not know: slots, reading, budgets.
"""

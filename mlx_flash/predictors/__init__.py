"""Which rows of an FFN a hidden state needs.

Read ``predictor`` (what a predictor is), ``low_rank`` and ``resident_part`` (the two that there
are), ``registry`` (the table of kinds: a new one is an entry there and a module), then
``predictor_file`` (predictors.safetensors), ``selection`` (which predictors a model is run with)
and ``fitting`` (what a kind does to be fitted by ``calibration``).

Knows: hidden states, rows, what each kind needs of a model. Does not know: slots, reading, budgets,
how predictors are fitted.
"""

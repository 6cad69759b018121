"""Predictors fitted to the neurons of a model, one layer at a time.

Read ``activity`` (counting which rows are active), ``training_data`` (what is recorded of a layer,
and the figures of a predictor on it), ``low_rank_fitter`` with its arithmetic in ``low_rank_fit``,
``threshold_fitter``, ``perplexity_search``, which chooses between what they fit, and ``report``.

Knows: recordings, rows' weights, perplexity. Does not know: how recordings come about.
"""

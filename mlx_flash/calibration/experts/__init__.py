"""How often each layer of a mixture uses which experts, so that a RAM budget is shared out well.

Read ``trace`` (what routers choose, recorded), ``stack_distance`` (hits at every cache size in one
pass), ``figures`` (what is computed of a layer, and ways to share slots out), ``measure`` (the
order of work) and ``report``.

Knows: routers' choices, cache policies. Does not know: predictors, neurons.
"""

"""Settings of a config.json: computed as transformers computes them, or refused.

Read ``normalise`` first: its ``settle`` takes the config of any family and gives it back as mlx-lm
and the decoders of this package understand it. ``rope`` and ``windows`` know what such settings
mean, ``table`` and the modules beside it which family does what with them.

Knows: how transformers 4 and 5 write a setting, what mlx-lm makes of it. Does not know: weights.
"""

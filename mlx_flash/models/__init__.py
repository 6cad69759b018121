"""Decoders that mlx-lm lacks or computes wrongly, in its file contract.

A module named after a Hugging Face ``model_type`` has ``ModelArgs`` and ``Model``, as those of
``mlx_lm.models``; ``architectures`` finds it. ``refit`` changes the activation of a model.
"""

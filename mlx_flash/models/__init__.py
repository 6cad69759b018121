"""Decoders that mlx-lm lacks, in its file contract: one module per Hugging Face ``model_type``.

A module has ``ModelArgs`` and ``Model``, as those of ``mlx_lm.models``; ``architectures`` finds it.
"""

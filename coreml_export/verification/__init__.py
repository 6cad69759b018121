"""Whether an export computes what MLX computes: program parity, on any machine.

Read ``kernels`` and ``interpreter`` (a package run in numpy), ``dense_host`` and ``paged_host`` (an
app's loops over it), ``distances`` and ``gates`` (what has to hold), ``verify`` (which runs make a
report). ``coreml_device`` runs Core ML itself, on macOS.

Knows: finished exports, MLX's logits. Does not know: how an export is made.
"""

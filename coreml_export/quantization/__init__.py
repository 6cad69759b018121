"""Weights in int8, int4 and palettes.

Read ``formats`` (one tensor in a scheme), ``recipes`` (which tensor gets which scheme),
``stored_weights`` (the interface behind which a model's stored tensors come), then how codes are
found on text: ``gptq``, ``channel_scaling``, ``calibrate``.

Knows: arrays, a decoder's description. Does not know: MIL, packages.
"""

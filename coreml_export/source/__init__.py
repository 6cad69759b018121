"""A model as named tensors, and what its decoder is made of.

Read ``weights_source``, ``decoder_spec``, then ``families``.
"""

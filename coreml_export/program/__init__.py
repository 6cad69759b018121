"""Core ML programs: dense and paged decoders, predictors.

Read ``coremltools_compat`` (all that is used of coremltools), ``weights``, ``layers`` (the parts of
a decoder), then ``dense``, ``paged`` and ``predictors`` (the functions of each package).

Knows: MIL, a decoder's description, stored weights. Does not know: files, what an export asks for.
"""

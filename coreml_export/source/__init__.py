"""A model as named tensors, and what its decoder is made of.

Read ``weights_source`` (tensors of a model directory, a Hugging Face directory or a GGUF file),
``decoder_spec`` (the description that everything else works on), ``families`` (which makes it),
then ``rotary_tables`` and ``tokenizer``.

Knows: mlx_flash's checkpoints, directories and families. Does not know: bits, MIL, packages.
"""

"""Core ML packages of mlx_flash's models for offline apps, checked against MLX on any machine.

Read ``settings`` (what can be asked for) and ``export`` (the order of work), then the packages in
the order in which they import each other: ``source`` (named tensors, what a decoder is made of),
``quantization`` (fewer bits), ``program`` (MIL), ``bundle`` (files of an export), ``verification``
(does it compute what MLX computes?). ``cli`` is the command line.

Knows: mlx_flash's models, files and predictors; Core ML's formats. Does not know: paging on a Mac.
mlx_flash does not know this package.
"""

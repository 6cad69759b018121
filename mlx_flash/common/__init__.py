"""What every package needs: files, work directories, sizes, the platform.

Knows: the operating system. Does not know: models, rows, MLX.
"""

"""Bytes of rows: the row file, and reading a few of its rows fast.

Read in this order: ``row_layout``, ``row_file``, ``row_writer``, ``read_requests``,
``scatter_list``, ``engines``, ``reader``.

Knows: files, disks. Does not know: MLX, models, what rows mean.
"""

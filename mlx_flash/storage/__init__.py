"""Bytes of rows: the row file, and reading a few of its rows fast.

Knows: files, disks, memory. Does not know: MLX, models, what rows mean, which are wanted.

Read in this order: ``row_layout`` (the bytes of a row), ``safetensors_header`` and ``row_file``
(where rows lie), ``row_writer``; then ``read_requests`` (row numbers to contiguous reads),
``scatter_list`` (where their bytes go), ``direct_io`` (past the page cache), ``engines`` and
``staging`` (who carries reads out), ``linux_aio`` and ``huge_pages`` (what Linux has for it), and
``reader``, which puts them together.
"""

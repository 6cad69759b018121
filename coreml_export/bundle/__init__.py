"""The files of an export.

Read ``mlpackage`` (a program as a package), ``rows`` (row file and embedding), ``manifest``,
``readme``, ``sizes`` (bytes, cuts, disk).

Knows: formats and names of files. Does not know: the order of work, how an export is checked.
"""

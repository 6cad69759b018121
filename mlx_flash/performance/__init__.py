"""How fast a model runs under a budget: forecast and measured.

Knows: disks and clocks. Does not know: how anything is printed.
"""

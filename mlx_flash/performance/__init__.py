"""How fast a model runs under a budget: foretold and measured.

Knows: disks and clocks. Does not know: how anything is printed.
"""

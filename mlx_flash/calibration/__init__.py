"""What is learned from running a model over text.

Read ``text`` (the text), ``probes`` (looking into a running model) and ``text_run`` (running it
inside a budget), then ``calibrate``: it records what FFNs do (``recordings``), has predictors
fitted and chosen (``neurons``) and reports (``report_files``). ``experts`` measures which experts a
mixture's layers use; ``reorder`` writes rows that are needed together near each other.

Knows: models, as ``runtime`` loads them, and what to write into their directories. Does not know:
how fast anything is.
"""

"""What the store knows of runs and models, and who may write it.

A run is what its record says (`run`), and the record is written by whoever holds the run's lease (`lease`), under a
fencing token that makes every earlier holder's writes fail. `recovery` finds runs whose trainer is gone, and lets each
be started again once. `versions` and `champions` say what is published and what is live. `orphans` finds what no
record names. Nothing here loses a committed checkpoint, whoever dies when.
"""

"""Committed checkpoints: which are kept, and how they are read back. `training.saver` writes them.

No payload is used before its size and sha256 match the record (`payload`). Then nothing in it can execute, or take
more memory than its size says (`archive`). A run resumes from its newest whole checkpoint; a damaged one is skipped
with a warning (`restore`). The newest is always kept (`retention`). `verify` reads all of a run's back, so that damage
is found before a run needs them.
"""

"""Listeners to the course of a training: `metrics.jsonl` in the store, and TensorBoard's event files.

They are told what happened and decide nothing. None of them can stop a run, whatever becomes of what it writes.
"""

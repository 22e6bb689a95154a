"""Listeners to the course of a training: `metrics.jsonl` in the store, TensorBoard's event files, an MLflow server.

They are told what happened and decide nothing. None of them can stop a run, whatever becomes of what it writes, and
none that needs a network is waited for: what the store knows can be told again (`mlflow`).
"""

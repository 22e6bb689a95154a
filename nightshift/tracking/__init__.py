"""Listeners to the course of a training: `metrics.jsonl` in the store, TensorBoard's event files, an MLflow server.

They are told what happened and decide nothing. None of them can stop a run, even if its output is lost. The training
does not wait for one that needs a network: what the store knows can be sent again (`mlflow`).
"""

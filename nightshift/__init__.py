"""The core of nightshift: exact resume, durable checkpoints, the training loop. No Prefect in here."""

__version__ = "0.1.0"

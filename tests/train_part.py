"""What a process of its own does in the tests of exact resume: train a run until a step, or to its end."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nightshift.checkpoints.payload import read_payload, weights_sha256
from nightshift.config.train import TrainConfig
from nightshift.errors import TrainingInterrupted
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256


@dataclass(frozen=True)
class Part:
    """How far it came, where it had started from, and what it ended with."""

    step: int
    resumed_from_step: int | None
    status: str
    weights_sha256: str
    state_sha256: str


def train_part(home: Path, prefix: str, run_id: str, config: TrainConfig, dataset: DatasetRef, stop: int) -> Part:
    with embedded_s3(home, prefix) as store:
        with suppress(TrainingInterrupted):
            train_alone(Workspace(store, home, 60, 5), run_id, config, dataset, should_stop=lambda step: step == stop)
        record, _ = read_record(store, run_id)
        payload = read_payload(store, record.checkpoints[-1])
        return Part(
            step=record.step,
            resumed_from_step=record.resumed_from_step,
            status=record.status,
            weights_sha256=weights_sha256(payload["model"]),
            state_sha256=state_sha256(payload),
        )

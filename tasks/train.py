"""Task: train a run to its end."""

from nightshift import progress
from nightshift.config.train import TrainConfig
from nightshift.errors import LeaseHeldError
from nightshift.parallel.launch import train_run
from nightshift.records.lease import wait_until_free
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.tracking import beside
from nightshift.workspace import Workspace
from tasks import ended_when_cancelled, interruptible, origin_of_this_run, progress_artifact, step


@step
def train(workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef, promote: bool) -> CheckpointRef:
    """Train from wherever the run stands. Called, not submitted: signals reach only the main thread."""
    origin = origin_of_this_run(promote)
    show = progress.watched(progress_artifact(run_id), seconds=5)
    with interruptible(), ended_when_cancelled(), show, beside.sending(workspace.store, workspace.mlflow, run_id):
        while True:
            if origin.deployment:  # if started twice, it waits for the living trainer and returns its result
                wait_until_free(workspace.store, run_id)
            try:
                return train_run(workspace, run_id, config, dataset, origin)
            except LeaseHeldError:  # the other was the first by a moment
                if not origin.deployment:
                    raise

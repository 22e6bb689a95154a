"""Task: train a run to its end."""

import signal

from prefect.exceptions import TerminationSignal

from nightshift import training
from nightshift.errors import Interrupted
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.settings import TrainConfig
from nightshift.workspace import Workspace
from tasks import step


@step
def train(workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef) -> CheckpointRef:
    """Train from wherever the run stands. Called, not submitted: signals reach only the main thread."""
    try:
        return training.train(workspace, run_id, config, dataset)
    except Interrupted as stopped:
        # As a failure it would count against the model; as this, Prefect ends the run Crashed, to be resumed.
        raise TerminationSignal(signal.SIGTERM) from stopped

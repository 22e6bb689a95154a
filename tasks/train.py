"""Task: train a run to its end."""

from prefect.context import FlowRunContext
from prefect.runtime import deployment, flow_run

from nightshift import progress
from nightshift.config.train import TrainConfig
from nightshift.errors import LeaseHeldError
from nightshift.parallel.launch import train_run
from nightshift.records.lease import wait_until_free
from nightshift.records.run import Origin
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.workspace import Workspace
from tasks import interruptible, progress_artifact, step


@step
def train(workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef, promote: bool) -> CheckpointRef:
    """Train from wherever the run stands. Called, not submitted: signals reach only the main thread."""
    name = f"{flow_run.get_flow_name()}/{deployment.get_name()}" if deployment.get_name() else None
    context = FlowRunContext.get()
    origin = Origin(
        flow_run_id=flow_run.get_id(),
        deployment=name,
        promote=promote,
        scheduled_at=flow_run.get_scheduled_start_time(),
        began_at=context.start_time if context else None,
    )
    with interruptible(), progress.watched(progress_artifact(run_id), seconds=5):
        while True:
            if name:  # if started twice, it waits for the living trainer and returns its result
                wait_until_free(workspace.store, run_id)
            try:
                return train_run(workspace, run_id, config, dataset, origin)
            except LeaseHeldError:  # the other was the first by a moment
                if not name:
                    raise

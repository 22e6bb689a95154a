"""Task: publish an evaluated model as an immutable version."""

from nightshift.publishing.publish import publish_model
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation, ModelRef
from nightshift.workspace import Workspace
from tasks import interruptible, step


@step
def publish(workspace: Workspace, checkpoint: CheckpointRef, dataset: DatasetRef, evaluation: Evaluation) -> ModelRef:
    """Export the model, compare each file with it on real images, and store all under `models/`."""
    with interruptible():
        return publish_model(workspace, checkpoint, dataset, evaluation)

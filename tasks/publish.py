"""Task: publish an evaluated model and finish its run."""

from nightshift import export
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation, ModelRef
from nightshift.workspace import Workspace
from tasks import interruptible, step


@step
def publish(workspace: Workspace, checkpoint: CheckpointRef, dataset: DatasetRef, evaluation: Evaluation) -> ModelRef:
    """Write `weights.pth`, `weights.safetensors` and `card.json` under `models/`."""
    with interruptible():
        return export.publish(workspace, checkpoint, dataset, evaluation)

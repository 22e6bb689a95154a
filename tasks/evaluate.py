"""Task: measure the stored weights on the test images."""

from nightshift.judging import evaluation
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation
from nightshift.workspace import Workspace
from tasks import interruptible, step


@step
def evaluate(workspace: Workspace, checkpoint: CheckpointRef, dataset: DatasetRef) -> Evaluation:
    """Read the checkpoint back, verify it, and evaluate what was read."""
    with interruptible():
        return evaluation.evaluate(workspace, checkpoint, dataset)

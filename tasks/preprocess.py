"""Task: a data set that is known by content on this machine."""

from nightshift.data.known import pack
from nightshift.refs import DatasetRef, SnapshotRef
from nightshift.workspace import Workspace
from tasks import step


@step
def preprocess(workspace: Workspace, snapshot: SnapshotRef) -> DatasetRef:
    """Collect its pixels from the snapshot's shards, unless this machine has them already, and check them."""
    return pack(workspace, snapshot)

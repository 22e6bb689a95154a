"""Task: a snapshot on this machine."""

from nightshift.data.packed import pack_snapshot
from nightshift.refs import DatasetRef, SnapshotRef
from nightshift.workspace import Workspace
from tasks import step


@step
def pack(workspace: Workspace, snapshot: SnapshotRef) -> DatasetRef:
    """Collect the snapshot's pixels from its shards, unless this machine has them already."""
    return pack_snapshot(workspace, snapshot)

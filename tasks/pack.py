"""Task: a snapshot on this machine."""

from nightshift.config.project import Effect
from nightshift.data.packed import pack_snapshot
from nightshift.refs import DatasetRef, SnapshotRef
from nightshift.workspace import Workspace
from tasks import step


@step
def pack(workspace: Workspace, snapshot: SnapshotRef, near_duplicates: Effect) -> DatasetRef:
    """Collect the snapshot's pixels from its shards, unless this machine has them already."""
    return pack_snapshot(workspace, snapshot, near_duplicates)

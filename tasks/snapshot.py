"""Task: tonight's images as a snapshot."""

from nightshift.config.project import DatasetConfig
from nightshift.data.parts import Reader, read_parts
from nightshift.data.snapshot import make_snapshot
from nightshift.refs import SnapshotRef
from nightshift.workspace import Workspace
from tasks import step


@step
def snapshot(workspace: Workspace, name: str, config: DatasetConfig, reader: Reader = read_parts) -> SnapshotRef:
    """List the source, read what is new, divide it into splits, and hold it to the rules."""
    return make_snapshot(workspace.store, name, config, reader)

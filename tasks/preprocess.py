"""Task: pack a raw data set into one immutable object."""

from nightshift.data.datasets import pack
from nightshift.refs import DatasetRef, RawRef
from nightshift.workspace import Workspace
from tasks import step


@step
def preprocess(workspace: Workspace, raw: RawRef) -> DatasetRef:
    """Pack, check and store the data set, unless an object with this digest exists already."""
    return pack(workspace, raw)

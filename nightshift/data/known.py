"""The data sets that nightshift knows by content: a source like a team's own, whose snapshot is always the same.

The first who trains on one makes its snapshot, and from then on the store has it. Runs of before there were snapshots
name an object of their own, and go on with the same images.
"""

from safetensors import safe_open

from nightshift import progress
from nightshift.config.project import DatasetConfig
from nightshift.data.datasets import Dataset, channel_statistics
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot, stored_snapshot
from nightshift.data.sources.cifar10 import KnownImages, arrays_of
from nightshift.data.specs import SPECS, Spec, get_spec
from nightshift.errors import DataCorruptError, ObjectNotFoundError, SourceError
from nightshift.records.snapshots import read_history
from nightshift.refs import DatasetRef, SnapshotRef
from nightshift.workspace import Workspace


def fetch(workspace: Workspace, name: str) -> SnapshotRef:
    """The snapshot of a data set that is known by content: the stored one, or one of its images from elsewhere.

    Raises:
        DataUnavailableError: neither the store nor any other place has them; the message lists each with its reason.
        StorageError: the store does not answer.
    """
    spec, newest = get_spec(name), read_history(workspace.store, name).newest
    if not newest:
        return _made(workspace, spec)
    progress.current().say(f"{name} from the snapshot {newest.digest[:12]}")
    return stored_snapshot(workspace.store, name, newest.digest)


def pack(workspace: Workspace, snapshot: SnapshotRef) -> DatasetRef:
    """Make sure that this machine has its pixels. Where the store's are damaged or gone, they are stored anew.

    Raises:
        DataUnavailableError, StorageError: as `fetch`.
    """
    try:
        return pack_snapshot(workspace, snapshot)
    except (DataCorruptError, ObjectNotFoundError, SourceError) as error:
        progress.current().warn(f"the snapshot of {snapshot.name} is stored anew: {error}")
    return pack_snapshot(workspace, _made(workspace, get_spec(snapshot.name)))


def is_of_before(ref: DatasetRef) -> bool:
    """Whether this names the object in which an older nightshift has stored a data set as a whole."""
    return ref.name in SPECS and ref.digest == SPECS[ref.name].digest


def open_of_before(workspace: Workspace, ref: DatasetRef) -> Dataset:
    """What an older nightshift has packed, mapped into memory; raises DataUnavailableError if no place has it."""
    spec = get_spec(ref.name)
    _, path = arrays_of(workspace, spec)
    with safe_open(path, framework="pt") as file:
        arrays = {name: file.get_tensor(name) for name in spec.sha256}
    mean, std = channel_statistics([arrays["train_images"].numpy()])
    return Dataset(spec.name, spec.digest, spec.classes, **arrays, mean=mean, std=std)


def _made(workspace: Workspace, spec: Spec) -> SnapshotRef:
    place, path = arrays_of(workspace, spec)
    progress.current().say(f"{spec.name} from the {place}")
    config = DatasetConfig(source=spec.name, image_size=spec.image_size, resize="stretch", storage="pixels")
    return make_snapshot(workspace.store, spec.name, config, source=KnownImages(spec, path))

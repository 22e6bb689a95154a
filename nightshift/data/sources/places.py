"""Which source a place means: a folder, an s3:// prefix, or a table in one of both."""

from pathlib import Path

from nightshift.config.project import DatasetConfig
from nightshift.data.sources.buckets import Buckets
from nightshift.data.sources.files import Files, LocalFiles
from nightshift.data.sources.folder import ClassFolders
from nightshift.data.sources.listed import Source
from nightshift.data.sources.table import TABLES, Table
from nightshift.errors import SourceError
from nightshift.storage.store import Store


def open_source(config: DatasetConfig, store: Store | None) -> Source:
    """The source that a data set names.

    Args:
        store: whose server is asked for s3:// places, unless the data set names a profile or an endpoint of its own;
            none for a place on this machine.

    Raises:
        SourceError: images are to be grouped by a column, and the source is no table.
        SettingsError: there is no such AWS profile.
    """
    by, buckets = config.split.by, Buckets(config, store)

    def files(place: str) -> Files:
        return buckets.of(place) if place.startswith("s3://") else LocalFiles(Path(place).expanduser().absolute())

    if config.source.lower().endswith(TABLES):
        folder, _, name = config.source.rpartition("/")
        return Table(files(folder or "."), name, buckets, "" if by == "image" else by)
    if by != "image":
        raise SourceError(f"split.by={by!r} names a column, and {config.source} is no table: say image")
    return ClassFolders(files(config.source))

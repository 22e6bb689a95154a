"""Which source a place means: a folder, an s3:// prefix, or a table in one of both."""

from pathlib import Path

from nightshift.config.project import DatasetConfig
from nightshift.data.sources.files import Files, LocalFiles, S3Files
from nightshift.data.sources.folder import ClassFolders
from nightshift.data.sources.listed import Source
from nightshift.data.sources.table import TABLES, Table
from nightshift.errors import SourceError
from nightshift.settings import S3Settings
from nightshift.storage.s3 import S3
from nightshift.storage.store import Store, split_url


def open_source(config: DatasetConfig, store: Store | None) -> Source:
    """The source that a data set names.

    Args:
        store: whose server is asked for s3:// places, unless the data set names a profile or an endpoint of its own;
            none for a place on this machine.

    Raises:
        SourceError: images are to be grouped by a column, and the source is no table.
        SettingsError: there is no such AWS profile.
    """
    by = config.split.by
    if config.source.lower().endswith(TABLES):
        folder, _, name = config.source.rpartition("/")
        return Table(_files(config, store, folder or "."), name, "" if by == "image" else by)
    if by != "image":
        raise SourceError(f"split.by={by!r} names a column, and {config.source} is no table: say image")
    return ClassFolders(_files(config, store, config.source))


def _files(config: DatasetConfig, store: Store | None, place: str) -> Files:
    if store is None or not place.startswith("s3://"):
        return LocalFiles(Path(place).expanduser().absolute())
    bucket, _ = split_url(place)
    # The embedded server has no bucket but ours, so another one is meant to be the team's, elsewhere.
    is_elsewhere = isinstance(store, S3) and store.is_embedded and store.bucket != bucket
    if config.profile or config.endpoint_url or is_elsewhere:
        settings = S3Settings(bucket=bucket, endpoint_url=config.endpoint_url)
        return S3Files(S3(settings, profile=config.profile), place)
    return S3Files(store, place)

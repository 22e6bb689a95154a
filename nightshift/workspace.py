"""Where a run keeps its things: the store, which is shared, and a directory on this machine, which is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nightshift.settings import CacheSettings, MlflowSettings, NodesSettings, Settings
from nightshift.storage.store import Store


@dataclass(frozen=True)
class Workspace:
    """What every task needs. Holds no state of a run."""

    store: Store
    home: Path
    lease_seconds: float
    save_retry_seconds: float
    nodes: NodesSettings = field(default_factory=NodesSettings)
    price_per_hour: float | None = None
    mlflow: MlflowSettings = field(default_factory=MlflowSettings)
    cache_gigabytes: float = CacheSettings().gigabytes


@contextmanager
def open_workspace(settings: Settings, to_make_room: bool = False) -> Iterator[Workspace]:
    """The workspace these settings describe, on the embedded S3 unless they name another store.

    Args:
        to_make_room: objects will be deleted, which a full disk below the embedded S3 would not allow.

    Raises:
        StorageError: the store cannot be used. This is checked here, before any work.
        LocalServiceError: the embedded S3 does not start.
    """
    # Here, because whoever trains on a store in memory needs no client of S3.
    from nightshift.local.s3 import embedded_s3, give_up_reserve
    from nightshift.storage.s3 import S3

    if settings.s3.embedded:
        if to_make_room:
            give_up_reserve(settings.home)
        with embedded_s3(settings.home, settings.s3.prefix) as store:
            yield _workspace(settings, store)
    else:
        # Few attempts, so that a wrong endpoint is reported within seconds.
        S3(settings.s3, attempts=2).check_access()
        yield _workspace(settings, S3(settings.s3))


def _workspace(settings: Settings, store: Store) -> Workspace:
    return Workspace(
        store,
        settings.home,
        settings.lease_seconds,
        settings.save_retry_seconds,
        settings.nodes,
        settings.price_per_hour,
        settings.mlflow,
        settings.cache.gigabytes,
    )

"""Which client reads an s3:// address of a data set: ours, or one with the team's own credentials."""

from dataclasses import dataclass, field, replace
from typing import Any

from nightshift.config.project import DatasetConfig
from nightshift.data.sources.files import S3Files
from nightshift.settings import S3Settings
from nightshift.storage.s3 import S3
from nightshift.storage.store import Store, split_url


@dataclass(frozen=True)
class Buckets:
    """The buckets that a data set's s3:// addresses lead to, each with a client of its own where it needs one."""

    config: DatasetConfig
    store: Store | None
    _made: dict[str, S3Files] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads what was listed here, and so needs no store but those of the buckets in it."""
        return Buckets, (self.config, None, self._made)

    def of(self, url: str) -> S3Files:
        """What reads the objects of an address.

        Raises:
            SettingsError: there is no such AWS profile.
        """
        bucket, _ = split_url(url)
        if bucket not in self._made:
            self._made[bucket] = S3Files(self._store_of(bucket), f"s3://{bucket}")
        return replace(self._made[bucket], place=url)

    def _store_of(self, bucket: str) -> Store:
        # The embedded server has no bucket but ours, so another one is meant to be the team's, elsewhere.
        is_elsewhere = isinstance(self.store, S3) and self.store.is_embedded and self.store.bucket != bucket
        if self.store is None or self.config.profile or self.config.endpoint_url or is_elsewhere:
            settings = S3Settings(bucket=bucket, endpoint_url=self.config.endpoint_url)
            return S3(settings, profile=self.config.profile)
        return self.store

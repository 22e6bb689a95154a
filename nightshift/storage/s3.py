"""The store in an S3-compatible bucket. This is the only file that imports boto3.

No method lets an error of botocore's through. The server checks bodies against the checksum boto3 sends. Conditional
writes are single PutObject calls, because a conditional CompleteMultipartUpload is not atomic on every store.
"""

import io
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.loaders import Loader, create_loader
from botocore.session import Session
from botocore.utils import parse_timestamp
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
from urllib3.exceptions import HTTPError as BrokenAnswer

from nightshift.disk import disk_is_full, explains_failure
from nightshift.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    PreconditionFailedError,
    SettingsError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnreachableError,
    UnfencedStoreError,
)
from nightshift.settings import S3Settings
from nightshift.storage.store import Stored, Upload, check_size, limited, split_url
from nightshift.text import masked

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


MIB = 1024 * 1024

# 16 MiB parts, four at a time, are as fast as any other way against one server, for 64 MiB as for 1 GiB. What has
# arrived is handed on in large pieces, of which no more than 64 MiB wait to be written: small ones cost a quarter of
# the speed. The CRT transfer client ignores `endpoint_url`.
_TRANSFER = TransferConfig(
    multipart_threshold=16 * MIB,
    multipart_chunksize=16 * MIB,
    max_concurrency=4,
    io_chunksize=MIB,
    max_io_queue=64,
    preferred_transfer_client="classic",
)
# For uploads from a pipe: only this many parts wait in memory. With _TRANSFER, ten would.
_PIPED = TransferConfig(
    multipart_threshold=16 * MIB, multipart_chunksize=16 * MIB, max_concurrency=2, preferred_transfer_client="classic"
)
_PIPED.max_in_memory_upload_chunks = 2
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403", "Forbidden"}
_NOT_FOUND = {"NoSuchKey", "NoSuchUpload", "404", "NotFound"}
_CONFLICT = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


@dataclass(frozen=True)
class Credentials:
    """A key pair that is not in boto3's own chain: the embedded server's."""

    access_key: str
    secret_key: str = field(repr=False)


class S3:
    """A `Store` in a bucket."""

    def __init__(
        self,
        settings: S3Settings,
        credentials: Credentials | None = None,
        attempts: int = 5,
        directory: Path | None = None,
        profile: str | None = None,
    ) -> None:
        """A client with these credentials, else those of an AWS profile, else those that boto3 finds.

        Args:
            directory: where the server has its data, if that is on this machine.

        Raises:
            SettingsError: no client can be made of the settings.
        """
        assert settings.bucket is not None
        self._made_of = settings, credentials, attempts, directory, profile
        self.is_embedded = credentials is not None
        self._directory = directory
        self.bucket = settings.bucket
        self.prefix = settings.prefix.strip("/") + "/" if settings.prefix.strip("/") else ""
        self.endpoint = masked(settings.endpoint_url or f"AWS S3 ({settings.region})")
        self._allow_unfenced = settings.allow_unfenced
        self._clock = _ServerClock()
        self._client = _client(settings, credentials, attempts, profile)
        self._client.meta.events.register("after-call.s3", self._clock.read)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets a client of its own."""
        return type(self), self._made_of

    def __repr__(self) -> str:
        return f"S3({self.url('')!r} at {self.endpoint})"

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def at(self, url: str) -> tuple["S3", str]:
        other = object.__new__(type(self))  # copy.copy would make another client, by `__reduce__`
        other.__dict__.update(self.__dict__)
        other.prefix = ""
        other.bucket, key = split_url(url)
        return other, key

    def now(self) -> datetime:
        """To the second; asks the server if it has not answered yet."""
        if not self._clock.known:
            self.check_access()
        return self._clock.now()

    def get(self, key: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        with self._explained("read", key):
            response = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            with closing(response["Body"]) as body:  # what is not read is not sent
                check_size(response["ContentLength"], max_bytes, self.url(key))
                return body.read(), response["ETag"]

    def head(self, key: str) -> Stored | None:
        try:
            with self._explained("look up", key):
                found = self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
        except ObjectNotFoundError:
            return None
        return Stored(key, found["ContentLength"], found["ETag"], found["LastModified"])

    def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        condition: dict[str, Any] = {}
        if if_match is not None:
            condition["IfMatch"] = if_match
        if if_absent:
            condition["IfNoneMatch"] = "*"
        try:
            with self._explained("write", key):
                written = self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=body, **condition)
        except ObjectNotFoundError as error:  # so AWS answers If-Match where nothing is; others answer 412
            raise PreconditionFailedError(str(error)) from error
        return written["ETag"]

    def upload(self, key: str, body: IO[bytes], advance: Callable[[int], object] | None = None) -> None:
        """In parts above 16 MiB; `advance` is called from worker threads."""
        config = _TRANSFER if body.seekable() else _PIPED
        with self._explained("write", key):
            self._client.upload_fileobj(body, self.bucket, self.prefix + key, Callback=advance, Config=config)

    def download(
        self, key: str, into: IO[bytes], advance: Callable[[int], object] | None = None, max_bytes: int | None = None
    ) -> None:
        """Parts in parallel, each retried."""
        file = limited(into, max_bytes, self.url(key))
        with self._explained("read", key):
            self._client.download_fileobj(self.bucket, self.prefix + key, file, Callback=advance, Config=_TRANSFER)

    def download_bytes(self, key: str, max_bytes: int | None = None) -> bytes:
        buffer = io.BytesIO()
        self.download(key, buffer, max_bytes=max_bytes)
        return buffer.getvalue()

    def list(self, prefix: str) -> Iterator[Stored]:
        """1,000 objects a request."""
        with self._explained("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for found in page.get("Contents", []):
                    key = found["Key"].removeprefix(self.prefix)
                    yield Stored(key, found["Size"], found["ETag"], found["LastModified"])

    def folders(self, prefix: str) -> Iterator[str]:
        with self._explained("list", prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix, Delimiter="/"
            ):
                for found in page.get("CommonPrefixes", []):
                    yield found["Prefix"].removeprefix(self.prefix + prefix).rstrip("/")

    def delete(self, key: str) -> None:
        with self._explained("delete", key):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        with self._explained("list unfinished uploads of", prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for found in page.get("Uploads", []):
                    yield Upload(found["Key"].removeprefix(self.prefix), found["UploadId"], found["Initiated"])

    def abort_upload(self, upload: Upload) -> None:
        with suppress(ObjectNotFoundError), self._explained("abort the upload of", upload.key):
            self._client.abort_multipart_upload(
                Bucket=self.bucket, Key=self.prefix + upload.key, UploadId=upload.upload_id
            )

    def check_access(self) -> None:
        with self._explained("list", ""):
            self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)

    def check_fencing(self) -> None:
        if self._allow_unfenced:
            return
        key = f"probe/{secrets.token_hex(8)}"
        etag = self.put(key, b"first")
        try:
            for condition in ({"if_absent": True}, {"if_match": '"' + "0" * 32 + '"'}):
                try:
                    self.put(key, b"second", **condition)
                except PreconditionFailedError:
                    continue
                raise UnfencedStoreError(
                    f"{self.endpoint} ignores conditional writes (If-None-Match, If-Match): two trainers could "
                    "damage each other's runs. Use a store that honours them, or set "
                    "NIGHTSHIFT_S3__ALLOW_UNFENCED=true if only one trainer ever writes here."
                )
            try:
                self.put(key, b"third", if_match=etag)
            except PreconditionFailedError:
                if self.get(key)[0] != b"third":  # else it was written, and only the response was lost
                    raise
        finally:
            self.delete(key)

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turn botocore's errors into ours, each with what to do next."""
        what = f"cannot {verb} {self.url(key)}"
        try:
            with self._translated(what):
                yield
        except StorageError as error:
            # A server whose disk is full may answer anything: an internal error, or nothing at all.
            may_be_full = type(error) in (StorageError, StorageUnreachableError)
            if not (may_be_full and self._directory and explains_failure(self._directory)):
                raise
            raise StorageFullError(f"{what}: {disk_is_full(self._directory)}") from error

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            detail = error.response.get("Error", {}).get("Message", code)
            if code in _CONFLICT:
                raise PreconditionFailedError(f"{what}: {detail}") from error
            if code in _NOT_FOUND:
                raise ObjectNotFoundError(f"{what}: there is no such object") from error
            if code == "NoSuchBucket":
                raise BucketNotFoundError(
                    f"there is no bucket {self.bucket!r} at {self.endpoint}: create it, or set NIGHTSHIFT_S3__BUCKET"
                ) from error
            if code in _DENIED:
                raise StorageDeniedError(
                    f"{what}: {self.endpoint} refuses the credentials ({detail}). Set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to ones that may use this bucket"
                ) from error
            raise StorageError(f"{what}: {self.endpoint} answers {code} ({detail})") from error
        except NoCredentialsError as error:
            raise StorageDeniedError(
                f"{what}: no credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        except (
            *(BotoConnectionError, HTTPClientError, RetriesExceededError),
            *(BrokenAnswer, ConnectionError, TimeoutError),
        ) as error:
            raise StorageUnreachableError(
                f"{what}: {self.endpoint} does not answer. Check that the server is up and that "
                "NIGHTSHIFT_S3__ENDPOINT_URL is right"
            ) from error
        except (BotoCoreError, S3DownloadFailedError, UnicodeEncodeError) as error:  # a key is text in UTF-8
            raise StorageError(f"{what}: {error}") from error


def _client(settings: S3Settings, credentials: Credentials | None, attempts: int, profile: str | None) -> "S3Client":
    try:
        session = Session(profile=profile)
        session.register_component("data_loader", _loader())
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_moment)
        return boto3.Session(botocore_session=session).client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            aws_access_key_id=credentials.access_key if credentials else None,
            aws_secret_access_key=credentials.secret_key if credentials else None,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": attempts},
                connect_timeout=5,
                read_timeout=settings.timeout_seconds,
                # Nobody comes between us and a server on this machine. Elsewhere without TLS, bodies are signed.
                s3={"addressing_style": "path", **({"payload_signing_enabled": False} if credentials else {})},
                request_checksum_calculation=settings.checksums,
            ),
        )
    except (BotoCoreError, ValueError) as error:  # no host in the endpoint, no such region or profile
        raise SettingsError(
            f"there is no way to the bucket: {error}. Correct NIGHTSHIFT_S3__ENDPOINT_URL, NIGHTSHIFT_S3__REGION or "
            "AWS's own variables"
        ) from None


@cache
def _loader() -> Loader:
    """What reads AWS's descriptions of S3: for all clients once, which takes 0.1 to 0.3 s."""
    return create_loader()


def _moment(text: str) -> datetime:
    """A time of an answer. botocore's own way takes 0.1 ms each, more than half of what a listing takes."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:  # in a header it is written otherwise
        return parse_timestamp(text)


def read_descriptions() -> None:
    """Do now what the first client of a process does, which takes 0.1 s: read AWS's descriptions of S3."""
    with suppress(SettingsError):  # whoever makes a client is told
        _client(S3Settings(), Credentials("", ""), 1, None)


class _ServerClock:
    """The time of the server, from the Date of its answers: leases must not depend on a worker's clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: tuple[datetime, float] | None = None

    @property
    def known(self) -> bool:
        return self._seen is not None

    def read(self, http_response: Any, **_: Any) -> None:
        date = http_response.headers.get("Date") if http_response is not None else None
        if date:
            dated = parsedate_to_datetime(date).astimezone(UTC)
            with self._lock:
                # A Date is truncated to the second: an estimate up to a second later still agrees with it.
                if not self._seen or not dated <= self._estimate() <= dated + timedelta(seconds=1):
                    self._seen = dated, time.monotonic()

    def now(self) -> datetime:
        with self._lock:
            return self._estimate()

    def _estimate(self) -> datetime:
        assert self._seen is not None
        dated, at = self._seen
        return dated + timedelta(seconds=time.monotonic() - at)

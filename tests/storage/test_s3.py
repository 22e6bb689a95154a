"""The store in a bucket: prefixes, parts, errors, credentials, and the server's clock."""

import io
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from botocore.awsrequest import AWSPreparedRequest

from nightshift.errors import (
    BucketNotFoundError,
    StorageDeniedError,
    StorageError,
    StorageUnreachableError,
    UnfencedStoreError,
)
from nightshift.settings import S3Settings
from nightshift.storage.s3 import MIB, S3, Credentials

ANYONE = Credentials("access", "secret")


@pytest.fixture(scope="module")
def credentials(home: Path, server: S3) -> Credentials:
    return Credentials(**json.loads((home / "s3" / "credentials.json").read_text()))


@pytest.fixture
def settings(server: S3, prefix: str) -> S3Settings:
    return S3Settings(endpoint_url=server.endpoint, bucket=server.bucket, prefix=prefix)


@pytest.fixture
def store(settings: S3Settings, credentials: Credentials) -> S3:
    return S3(settings, credentials)


@pytest.fixture(scope="module")
def refused(server: S3) -> S3:
    """A client whose credentials the server does not know."""
    return S3(S3Settings(endpoint_url=server.endpoint, bucket=server.bucket), ANYONE)


@pytest.fixture(scope="module")
def unreachable() -> Iterator[S3]:
    """A client of a closed port."""
    with socket.socket() as closed:  # bound but not listening: nobody else can open the port meanwhile
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        yield S3(S3Settings(endpoint_url=endpoint, bucket="bucket"), ANYONE, attempts=1)


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[S3]:
    """A client of an HTTP server that does what no real S3 server can be made to do."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{http.server_port}"
            yield S3(S3Settings(endpoint_url=endpoint, bucket="bucket"), ANYONE, attempts=1)
        finally:
            http.shutdown()
            thread.join()


def test_keys_do_not_contain_the_prefix_and_are_listed_in_order(store: S3) -> None:
    for key in ("b/2", "a/1", "b/1", "b"):
        store.put(key, key.encode())
    assert [found.key for found in store.list("")] == ["a/1", "b", "b/1", "b/2"]
    assert [found.key for found in store.list("b/")] == ["b/1", "b/2"]


def test_one_prefix_sees_nothing_of_another(store: S3, settings: S3Settings, credentials: Credentials) -> None:
    store.put("key", b"mine")
    # The second's name begins like the first's: only a whole path component may separate them.
    other = S3(settings.model_copy(update={"prefix": settings.prefix + "-too"}), credentials)
    assert list(other.list("")) == []
    assert other.head("key") is None
    other.put("key", b"theirs")
    other.delete("key")
    assert store.get("key")[0] == b"mine"
    assert [found.key for found in store.list("")] == ["key"]


def test_without_a_prefix_keys_are_the_buckets_own(server: S3, store: S3, prefix: str) -> None:
    store.put("key", b"body")
    assert [found.key for found in server.list(prefix)] == [f"{prefix}/key"]
    assert server.get(f"{prefix}/key")[0] == b"body"


def test_more_objects_than_one_answer_holds_are_all_listed(store: S3) -> None:
    def two_an_answer(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 2

    store._client.meta.events.register("before-parameter-build.s3.ListObjectsV2", two_an_answer)
    keys = [f"many/{number}" for number in range(5)]
    for key in keys:
        store.put(key, b"")
    assert [found.key for found in store.list("many/")] == keys


def test_an_object_in_several_parts_comes_back_whole_and_every_byte_is_reported_once(store: S3) -> None:
    body, sent, received = secrets.token_bytes(70 * MIB), list[int](), list[int]()
    store.upload("big", io.BytesIO(body), sent.append)
    into = io.BytesIO()
    store.download("big", into, received.append)
    assert into.getvalue() == body
    assert store.download_bytes("big") == body
    assert sum(sent) == sum(received) == len(body)


@pytest.mark.parametrize(("operation", "size"), [("PutObject", MIB), ("UploadPart", 17 * MIB)])
def test_a_body_that_changes_on_its_way_is_refused(store: S3, operation: str, size: int) -> None:
    def change(request: AWSPreparedRequest, **_: object) -> None:
        request.body = b"1" * int(request.headers["Content-Length"])

    store._client.meta.events.register(f"before-send.s3.{operation}", change)
    with pytest.raises(StorageError, match="did not match"):
        store.upload("changed", io.BytesIO(b"0" * size))
    assert store.head("changed") is None


def test_an_upload_that_fails_midway_leaves_neither_an_object_nor_unfinished_parts(store: S3) -> None:
    class Torn(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 64 * MIB:
                raise OSError("the disk is torn")
            return super().read(size)

    with pytest.raises(OSError, match="torn"):
        store.upload("big", Torn(bytes(70 * MIB)))
    assert store.head("big") is None
    unfinished = store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert unfinished.get("Uploads", []) == []


@pytest.mark.parametrize(
    "use",
    [S3.check_access, lambda store: store.get("key"), lambda store: list(store.list(""))],
    ids=["check_access", "get", "list"],
)
def test_a_missing_bucket_is_named(settings: S3Settings, credentials: Credentials, use: Callable[[S3], object]) -> None:
    store = S3(settings.model_copy(update={"bucket": "no-such-bucket"}), credentials)
    with pytest.raises(BucketNotFoundError, match="'no-such-bucket'"):
        use(store)


USES: dict[str, Callable[[S3], object]] = {
    "check_access": S3.check_access,
    "get": lambda store: store.get("key"),
    "head": lambda store: store.head("key"),
    "put": lambda store: store.put("key", b""),
    "upload": lambda store: store.upload("key", io.BytesIO(bytes(17 * MIB))),
    "download": lambda store: store.download_bytes("key"),
    "list": lambda store: list(store.list("")),
    "delete": lambda store: store.delete("key"),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())


@every_use
def test_wrong_credentials_are_refused_and_the_variables_to_set_are_named(
    refused: S3, use: Callable[[S3], object]
) -> None:
    with pytest.raises(StorageDeniedError, match="AWS_ACCESS_KEY_ID"):
        use(refused)


def test_a_wrong_secret_for_the_right_access_key_is_refused(settings: S3Settings, credentials: Credentials) -> None:
    with pytest.raises(StorageDeniedError, match="AWS_SECRET_ACCESS_KEY"):
        S3(settings, Credentials(credentials.access_key, "wrong")).check_access()


def test_no_credentials_at_all_are_told_as_such(
    settings: S3Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageDeniedError, match=r"no credentials found. Set AWS_ACCESS_KEY_ID"):
        S3(settings).check_access()


@every_use
def test_an_endpoint_that_does_not_answer_is_told_with_the_variable_to_set(
    unreachable: S3, use: Callable[[S3], object]
) -> None:
    with pytest.raises(StorageUnreachableError, match="NIGHTSHIFT_S3__ENDPOINT_URL") as caught:
        use(unreachable)
    assert unreachable.endpoint in str(caught.value)


class TornAnswers(BaseHTTPRequestHandler):
    """Promises a hundred bytes and hangs up after ten."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", format_datetime(datetime.now(UTC), usegmt=True))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(bytes(10))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("use", [USES["get"], USES["download"]], ids=["get", "download"])
def test_a_connection_that_breaks_off_within_the_body_is_a_storage_error(use: Callable[[S3], object]) -> None:
    with answering(TornAnswers) as store, pytest.raises(StorageError):
        use(store)


@pytest.mark.parametrize("use", [lambda store: store.get("\udcff"), lambda store: list(store.list("\udcff"))])
def test_a_key_that_is_no_text_is_a_storage_error(unreachable: S3, use: Callable[[S3], object]) -> None:
    with pytest.raises(StorageError, match="surrogates not allowed"):
        use(unreachable)


def test_the_clock_is_the_servers_own_and_moves_with_its_answers() -> None:
    class Dated(BaseHTTPRequestHandler):
        date: ClassVar[datetime]

        def do_GET(self) -> None:
            body = b"<ListBucketResult/>"
            self.send_response_only(200)
            self.send_header("Date", format_datetime(self.date, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    minute = timedelta(minutes=1)
    with answering(Dated) as store:
        for Dated.date in (datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC), datetime(2033, 5, 18, 3, 33, 20, tzinfo=UTC)):
            store.check_access()
            first, second = store.now(), store.now()
            assert Dated.date <= first < second < Dated.date + minute


def test_the_clock_asks_a_server_that_has_not_answered_yet_and_is_in_utc(
    settings: S3Settings, credentials: Credentials
) -> None:
    now = S3(settings, credentials).now()
    assert now.utcoffset() == timedelta(0)
    assert abs(now - datetime.now(UTC)) < timedelta(seconds=5)  # here it is this machine's


def test_the_clock_of_a_server_that_cannot_be_asked_is_not_guessed(unreachable: S3) -> None:
    with pytest.raises(StorageError):
        unreachable.now()


def test_the_secret_is_in_no_text_of_the_credentials_or_the_client(settings: S3Settings) -> None:
    credentials = Credentials("access", "hush-hush")
    store = S3(settings, credentials)
    with pytest.raises(StorageDeniedError) as caught:
        store.check_access()
    assert "hush" not in f"{credentials} {credentials!r} {store} {store!r} {caught.value} {vars(store)}"


class Deaf(S3):
    """A store that ignores some conditions."""

    ignored: ClassVar[set[str]]

    def put(self, key: str, body: bytes, **condition: Any) -> str:
        return super().put(key, body, **{name: value for name, value in condition.items() if name not in self.ignored})


@pytest.mark.parametrize("ignored", [{"if_absent"}, {"if_match"}, {"if_absent", "if_match"}], ids=sorted)
def test_a_store_that_ignores_conditions_is_refused_unless_that_is_allowed(
    settings: S3Settings, credentials: Credentials, ignored: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Deaf, "ignored", ignored, raising=False)
    store = Deaf(settings, credentials)
    with pytest.raises(UnfencedStoreError, match="NIGHTSHIFT_S3__ALLOW_UNFENCED"):
        store.check_fencing()
    assert list(store.list("")) == []
    Deaf(settings.model_copy(update={"allow_unfenced": True}), credentials).check_fencing()


def test_another_bucket_is_asked_by_the_same_client_which_takes_long_to_make(server: S3) -> None:
    other, key = server.at("s3://elsewhere/photos/1.png")
    assert (other.url(key), other._client is server._client) == ("s3://elsewhere/photos/1.png", True)

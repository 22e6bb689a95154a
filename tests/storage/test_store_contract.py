"""What every store promises, asked of the S3 server and of the one in memory."""

import io
import re
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from nightshift.errors import ConfigError, ObjectNotFoundError, ObjectTooLargeError, PreconditionFailedError
from nightshift.storage.store import Store
from tests.stores import begin_upload

MIB = 1024 * 1024


def test_what_is_put_can_be_got_looked_up_listed_and_deleted(store: Store) -> None:
    etag = store.put("some/key", b"body")
    assert store.get("some/key") == (b"body", etag)
    found = store.head("some/key")
    assert found is not None
    assert (found.key, found.size, found.etag) == ("some/key", 4, etag)
    assert abs(found.modified - store.now()) < timedelta(seconds=5)
    assert list(store.list("some/")) == [found]
    store.delete("some/key")
    assert store.head("some/key") is None
    assert list(store.list("")) == []


def test_an_object_that_is_too_large_is_not_got(store: Store) -> None:
    etag = store.put("key", b"x" * MIB)
    with pytest.raises(ObjectTooLargeError, match=r"key has 1,048,576 bytes, and at most 1,048,575 are read"):
        store.get("key", MIB - 1)
    assert store.get("key", MIB) == (b"x" * MIB, etag)


def test_versions_with_other_bytes_have_other_etags(store: Store) -> None:
    assert store.put("key", b"first") != store.put("key", b"second")


def test_keys_are_listed_in_order_whatever_the_order_of_their_writes(store: Store) -> None:
    for key in ("b/2", "a/1", "b/1", "b", "b/ü", "b/10"):
        store.put(key, key.encode())
    assert [found.key for found in store.list("")] == ["a/1", "b", "b/1", "b/10", "b/2", "b/ü"]
    assert [found.key for found in store.list("b/1")] == ["b/1", "b/10"]
    assert list(store.list("nothing/")) == []


def test_a_url_names_the_object_in_its_bucket_without_the_prefix(store: Store) -> None:
    store.put("some/key", b"body")
    bucket, key = store.at(store.url("some/key"))
    assert bucket.get(key)[0] == b"body"
    assert bucket.url(key) == store.url("some/key")
    bucket.put(f"{key}-too", b"beside it")
    assert store.get("some/key-too")[0] == b"beside it"


@pytest.mark.parametrize("url", ["https://bucket/key", "s3://", "s3:///key", "key"])
def test_what_is_no_url_of_an_object_is_refused(store: Store, url: str) -> None:
    with pytest.raises(ConfigError, match="s3://BUCKET/KEY"):
        store.at(url)


def test_a_write_that_requires_absence_leaves_what_is_there(store: Store) -> None:
    etag = store.put("key", b"first", if_absent=True)
    with pytest.raises(PreconditionFailedError, match=re.escape(store.url("key"))):
        store.put("key", b"second", if_absent=True)
    assert store.get("key") == (b"first", etag)
    store.delete("key")
    store.put("key", b"second", if_absent=True)


def test_a_write_over_another_version_leaves_what_is_there(store: Store) -> None:
    old = store.put("key", b"first")
    new = store.put("key", b"second", if_match=old)
    with pytest.raises(PreconditionFailedError, match=re.escape(store.url("key"))):
        store.put("key", b"third", if_match=old)
    assert store.get("key") == (b"second", new)


def test_a_write_over_a_version_that_was_deleted_leaves_nothing(store: Store) -> None:
    etag = store.put("key", b"first")
    store.delete("key")
    with pytest.raises(PreconditionFailedError):
        store.put("key", b"second", if_match=etag)
    assert store.head("key") is None


def test_of_twenty_writers_that_require_absence_exactly_one_wins(store: Store) -> None:
    barrier = threading.Barrier(20)

    def write(number: int) -> int | None:
        barrier.wait()
        try:
            store.put("key", str(number).encode(), if_absent=True)
        except PreconditionFailedError:
            return None
        return number

    with ThreadPoolExecutor(20) as pool:
        winners = [number for number in pool.map(write, range(20)) if number is not None]
    assert len(winners) == 1
    assert store.get("key")[0] == str(winners[0]).encode()


def test_of_eighty_compare_and_swap_increments_by_eight_threads_none_is_lost(store: Store) -> None:
    store.put("counter", b"0")

    def increment() -> None:
        while True:
            value, etag = store.get("counter")
            try:
                store.put("counter", str(int(value) + 1).encode(), if_match=etag)
            except PreconditionFailedError:
                continue
            return

    def ten_increments(_: int) -> None:
        for _ in range(10):
            increment()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ten_increments, range(8)))
    assert store.get("counter")[0] == b"80"


@pytest.mark.parametrize("size", [0, 1, 17 * MIB], ids=["empty", "one request", "one part"])
def test_an_object_of_any_size_comes_back_whole_and_every_byte_is_reported_once(store: Store, size: int) -> None:
    body, sent, received = secrets.token_bytes(size), list[int](), list[int]()
    store.upload("big", io.BytesIO(body), sent.append)
    into = io.BytesIO()
    store.download("big", into, received.append)
    assert into.getvalue() == body
    assert store.download_bytes("big") == body
    assert sum(sent) == sum(received) == len(body)


def test_an_object_larger_than_it_may_be_is_not_read_to_its_end(store: Store) -> None:
    body, received = secrets.token_bytes(20 * MIB), list[int]()
    store.upload("big", io.BytesIO(body))
    into = io.BytesIO()
    with pytest.raises(ObjectTooLargeError, match=re.escape(store.url("big"))):
        store.download("big", into, received.append, max_bytes=MIB)
    assert sum(received) < len(body)
    assert len(into.getvalue()) <= MIB
    with pytest.raises(ObjectTooLargeError):
        store.download_bytes("big", max_bytes=len(body) - 1)
    assert store.download_bytes("big", max_bytes=len(body)) == body


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.get("missing"),
        lambda store: store.download_bytes("missing"),
        lambda store: store.download("missing", io.BytesIO()),
    ],
    ids=["get", "download_bytes", "download"],
)
def test_reading_what_is_not_there_names_it(store: Store, read: Callable[[Store], object]) -> None:
    with pytest.raises(ObjectNotFoundError, match=re.escape(store.url("missing"))):
        read(store)


def test_looking_up_or_deleting_what_is_not_there_is_no_error(store: Store) -> None:
    assert store.head("missing") is None
    store.delete("missing")


def test_an_unfinished_upload_is_listed_until_it_is_aborted_and_is_no_object(store: Store) -> None:
    begin_upload(store, "some/key")
    begin_upload(store, "other/key")
    (upload,) = store.list_uploads("some/")
    assert upload.key == "some/key"
    assert abs(upload.started - store.now()) < timedelta(seconds=5)
    assert store.head("some/key") is None
    store.abort_upload(upload)
    store.abort_upload(upload)
    assert [upload.key for upload in store.list_uploads("")] == ["other/key"]


def test_the_clock_is_in_utc_and_goes_forward(store: Store) -> None:
    first, second = store.now(), store.now()
    assert first <= second
    assert first.utcoffset() == timedelta(0)
    assert abs(first - datetime.now(UTC)) < timedelta(seconds=5)


def test_a_usable_store_passes_its_checks_which_leave_nothing_behind(store: Store) -> None:
    store.check_access()
    store.check_fencing()
    assert list(store.list("")) == []

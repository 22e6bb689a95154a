"""Documents: what is damaged is not believed, what is newer says so, and no change is ever lost."""

import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal

import pytest

from nightshift.errors import (
    DocumentDamagedError,
    DocumentNewerError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    StorageUnreachableError,
)
from nightshift.ids import RunId
from nightshift.storage import documents
from nightshift.storage.documents import Document
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from tests.stores import Faulty

# What nightshift wrote when there was one format only, byte for byte.
OF_FORMAT_1 = b"""{
 "format": 1,
 "name": "note",
 "counted": 3.0,
 "sha256": "2ba011e134d1591cc797ebf786d37658d364f951a69c37b52afe7c0e902fbc02"
}"""


class Note(Document):
    title: ClassVar[str] = "note"
    if_damaged: ClassVar[str] = "Write it again"
    max_bytes: ClassVar[int] = 1_000_000

    format: Literal[2] = 2
    name: RunId = "note"
    numbers: list[int] = []  # noqa: RUF012

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "numbers": [int(fields["counted"])]}


class OldNote(Document):
    title: ClassVar[str] = "note"
    if_damaged: ClassVar[str] = "Write it again"
    max_bytes: ClassVar[int] = 1_000_000

    format: Literal[1] = 1
    name: RunId = "note"
    counted: float = 3.0


def add(number: int) -> Callable[[Note | None], Note]:
    def change(found: Note | None) -> Note:
        note = found or Note()
        return note if number in note.numbers else note.changed(numbers=[*note.numbers, number])

    return change


def test_a_document_comes_back_as_it_was_written(store: Store) -> None:
    note = Note(numbers=[1, 2])
    etag = documents.write(store, "note.json", note, None)
    assert documents.read(store, "note.json", Note) == (note, etag)
    fields = json.loads(store.get("note.json")[0])
    assert fields.keys() == {"format", "name", "numbers", "sha256"}
    assert fields["format"] == 2


def test_a_document_of_an_older_format_is_read_as_one_of_the_newest(store: Store) -> None:
    assert documents.encoded(OldNote()) == OF_FORMAT_1
    store.put("note.json", OF_FORMAT_1)
    assert documents.read(store, "note.json", Note)[0] == Note(numbers=[3])


def test_a_document_of_a_newer_format_says_that_nightshift_is_to_be_updated() -> None:
    body = documents.encoded(Note())
    with pytest.raises(DocumentNewerError) as refused:
        documents.decoded(body, "s3://bucket/note.json", OldNote, "note.json")
    assert str(refused.value) == (
        "s3://bucket/note.json was written by a newer nightshift (format 2; this one reads up to 1): update nightshift"
    )


def test_a_document_is_first_written_only_where_nothing_is_and_then_only_over_the_version_that_was_read(
    store: Store,
) -> None:
    first = documents.write(store, "note.json", Note(), None)
    with pytest.raises(PreconditionFailedError):
        documents.write(store, "note.json", Note(numbers=[1]), None)
    documents.write(store, "note.json", Note(numbers=[2]), first)
    with pytest.raises(PreconditionFailedError):
        documents.write(store, "note.json", Note(numbers=[3]), first)
    assert documents.read(store, "note.json", Note)[0].numbers == [2]


def test_there_is_no_document_where_nothing_is(store: Store) -> None:
    with pytest.raises(ObjectNotFoundError):
        documents.read(store, "note.json", Note)


def test_of_many_changes_by_many_threads_none_is_lost(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: documents.change(store, "note.json", Note, add(number)), range(24)))
    assert sorted(documents.read(store, "note.json", Note)[0].numbers) == list(range(24))


def test_a_change_whose_response_is_lost_is_made_once() -> None:
    store = Faulty(MemoryStore())
    store.lose_response("put", PreconditionFailedError("what boto3's own retry sees after its first try has landed"))
    assert documents.change(store, "note.json", Note, add(1)).numbers == [1]
    assert not store.planned
    assert documents.read(store, "note.json", Note)[0].numbers == [1]


def test_a_change_that_always_loses_the_race_ends_in_an_error() -> None:
    store = Faulty(MemoryStore())
    store.fail("put", PreconditionFailedError("as a store says it that never lets anybody write"), times=math.inf)
    with pytest.raises(StorageError, match=r"note\.json could not be changed: 100 times another write came first"):
        documents.change(store, "note.json", Note, add(1))
    assert store.calls["put", "note.json"] == 100


@pytest.mark.parametrize("wrong", [{"name": "a/b"}, {"numbers": list(range(200_000))}])
def test_what_could_not_be_read_again_is_not_written(wrong: dict[str, Any]) -> None:
    store = MemoryStore()
    with pytest.raises(DocumentDamagedError, match="nothing was written, as it could not be read again"):
        documents.change(store, "note.json", Note, lambda found: Note().changed(**wrong))
    assert list(store.list("")) == []


def test_a_change_that_changes_nothing_writes_nothing() -> None:
    store = Faulty(MemoryStore())
    documents.change(store, "note.json", Note, add(1))
    documents.change(store, "note.json", Note, add(1))
    assert documents.change(store, "other.json", Note, lambda found: found) is None
    assert store.calls["put", "note.json"] == 1
    assert store.calls["put", "other.json"] == 0


def test_a_store_that_fails_is_not_taken_for_an_empty_one() -> None:
    store = Faulty(MemoryStore())
    store.fail("get", StorageUnreachableError("no answer"))
    with pytest.raises(StorageUnreachableError):
        documents.change(store, "note.json", Note, add(1))
    assert store.calls["put", "note.json"] == 0


def test_a_bit_that_flipped_on_the_wire_only_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    documents.write(store, "note.json", Note(numbers=[1]), None)
    body, etag = store.get("note.json")
    answers = [(body.replace(b"1", b"3"), etag), (body, etag)]
    monkeypatch.setattr(store, "get", lambda key, max_bytes: answers.pop(0))
    assert documents.read(store, "note.json", Note)[0].numbers == [1]


def sealed(**fields: Any) -> bytes:
    """Fields with the right sha256, whatever they are."""
    return json.dumps({**fields, "sha256": documents._digest(fields)}).encode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "it is not JSON"),
        (b'{"format": 2', "it is not JSON"),
        (b"\xff\xfe\xfa", "it is not JSON"),
        (b"[]", "its fields are not those of one"),
        (b"null", "its fields are not those of one"),
        (b"3", "its fields are not those of one"),
        (b"[" * 100_000, "its fields are not those of one"),
        (b'{"format": ' + b"9" * 5000 + b"}", ""),
        (b"{}", "its sha256 is not the one it holds"),
        (documents.encoded(Note(numbers=[1])).replace(b"1", b"3"), "its sha256 is not the one it holds"),
        (sealed(format="2"), "it has no format number"),
        (sealed(format=True), "it has no format number"),
        (sealed(format=0), "it has no format number"),
        (sealed(format=None), "it has no format number"),
        (sealed(format=1), "its fields are not those of one"),
        (sealed(format=2, name=None), "name: should be a valid string"),
        (sealed(format=2, name="a/b"), "run id 'a/b' is not valid"),
        (sealed(format=2, numbers=[1, "x"]), "numbers.1: should be a valid integer"),
        (sealed(format=2, numbers=[float("inf")]), "numbers.0: "),
        (sealed(format=2, numbers=[1e400]), "numbers.0: "),
        (sealed(format=2, more=[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]), "its lists and objects lie too deep in each other"),
        (b" " * 1_000_001, "it has more than 1,000,000 bytes"),
    ],
    ids=range(22),
)
def test_a_damaged_document_is_one_sentence_with_its_url_and_what_to_do(body: bytes, reason: str) -> None:
    store = MemoryStore()
    store.put("note.json", body)
    with pytest.raises(DocumentDamagedError) as refused:
        documents.read(store, "note.json", Note)
    message = str(refused.value)
    assert message.startswith(f"{store.url('note.json')} is damaged, or not a note: {reason}")
    assert message.endswith(". Write it again")
    assert "\n" not in message
    assert not re.search("pydantic|https?:", message)


def test_every_flipped_byte_of_a_sealed_document_is_noticed() -> None:
    body = documents.encoded(Note(numbers=[1, 2, 3]))
    for place in range(len(body)):
        damaged = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        try:
            found = documents.decoded(damaged, "url", Note, "note.json")
        except DocumentDamagedError:
            continue
        # Space between the fields may have become other space.
        assert found == Note(numbers=[1, 2, 3])

"""A document: one small JSON object in the store that is read, checked, and changed by compare-and-swap.

A document holds its own sha256, so that a bit that flips in it, on the wire or at rest, is noticed and not believed.
It also holds its format number: an older format is read, and a newer one is refused with an error that says so. The
sha256 is no signature. So each value is bounded (`values`), and so is the size of each document, and a copy under
another key is refused. Whatever lies under a key is read as a document or refused with one error.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ValidationError

from nightshift.errors import (
    DocumentDamagedError,
    DocumentNewerError,
    NightshiftError,
    ObjectNotFoundError,
    ObjectTooLargeError,
    PreconditionFailedError,
    StorageError,
)
from nightshift.explain import problem_of
from nightshift.storage.store import Store
from nightshift.values import FROZEN

MIB = 1024 * 1024
_DEEPEST = 16
"""How deep the lists and objects in a document may lie in each other; those of nightshift's lie 6 deep."""
_LONGEST_REASON = 300
_TRIES = 100
"""How often a change is made again after somebody else's came first."""


class Part(BaseModel):
    """A frozen value inside a document. Fields it does not know are ignored: a later format may add some."""

    model_config = FROZEN

    def changed(self, **fields: Any) -> Self:
        """A copy with these fields; their values are not validated."""
        return self.model_copy(update=fields)


class Document(Part):
    """What a stored object says. Each kind has a field `format` whose default is the newest number it can read."""

    title: ClassVar[str]
    """What the object is, for messages: `run record`."""
    if_damaged: ClassVar[str]
    """What a person can do about a damaged one: a whole sentence without its full stop."""
    max_bytes: ClassVar[int]
    """A larger object is none, and is not fetched."""
    sealed_since: ClassVar[int] = 1
    """The first format that holds its own sha256. A kind that wants to know it has a field `sha256`."""

    @classmethod
    def newest_format(cls) -> int:
        """The number that is written, and the highest that is read."""
        return int(cls.model_fields["format"].default)

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of an older format, as the newest has them. `format` is still the old number, and is replaced."""
        return fields

    def check(self, key: str) -> None:
        """Raise ValueError or ConfigError if this cannot be what nightshift has stored under `key`.

        A copy of another document fails this check, because it would name that document's objects.
        """


D = TypeVar("D", bound=Document)
Changed = TypeVar("Changed", bound=Document | None)
Returned = TypeVar("Returned")


def read(store: Store, key: str, kind: type[D]) -> tuple[D, str]:
    """The document under a key, and its ETag. A damaged one is read a second time, as it may be whole at rest.

    Raises:
        ObjectNotFoundError: there is none.
        DocumentDamagedError: it is not such a document, or was changed by something else than nightshift.
        DocumentNewerError: a newer nightshift wrote it.
        StorageError: it cannot be read.
    """
    with suppress(DocumentDamagedError):
        return _read_once(store, key, kind)
    return _read_once(store, key, kind)


def write(store: Store, key: str, document: Document, etag: str | None) -> str:
    """Put a document over the version with this ETag, or with None only where nothing is; return the new ETag.

    Raises:
        PreconditionFailedError: something else is there. After a lost response it can be one's own write.
        DocumentDamagedError: it could not be read again, so it was not written.
        StorageError: it may or may not have been written.
    """
    body = encoded(document)
    try:
        decoded(body, store.url(key), type(document), key)
    except DocumentDamagedError as error:
        raise DocumentDamagedError(f"nothing was written, as it could not be read again: {error}") from error
    return store.put(key, body, if_absent=True) if etag is None else store.put(key, body, if_match=etag)


def settled(url: str, once: Callable[[], Returned]) -> Returned:
    """What `once` returns. It is called again when it raises PreconditionFailedError: another's write came first.

    Raises:
        StorageError: others came first each time; nothing was written.
    """
    for _ in range(_TRIES):
        with suppress(PreconditionFailedError):
            return once()
    raise StorageError(
        f"{url} could not be changed: {_TRIES} times another write came first. Look who writes to it, and try again"
    )


def change(store: Store, key: str, kind: type[D], change: Callable[[D | None], Changed]) -> Changed:
    """Store what `change` makes of a document, and return that.

    Args:
        change: gets the document as it stands, or None if there is none. It is applied again whenever somebody else
            has changed the document meanwhile, or a response was lost. Applied to its own result, it must return that
            result. If it returns what it got, nothing is written.

    Raises:
        DocumentDamagedError, DocumentNewerError: as `read`.
        StorageError: it may or may not have been written.
    """

    def once() -> Changed:
        found: D | None = None
        etag: str | None = None
        with suppress(ObjectNotFoundError):
            found, etag = read(store, key, kind)
        changed = change(found)
        is_same = changed == found
        if changed is None or is_same:
            return changed
        write(store, key, changed, etag)
        return changed

    return settled(store.url(key), once)


def encoded(document: Document) -> bytes:
    """The JSON that is stored, in the newest format."""
    fields = document.model_dump(mode="json", exclude={"sha256"})
    return json.dumps({**fields, "sha256": _digest(fields)}, indent=1).encode()


def check_size(size: int, url: str, kind: type[Document]) -> None:
    """Raise DocumentDamagedError if an object of so many bytes cannot be such a document: before it is fetched."""
    if size > kind.max_bytes:
        raise _damaged(url, kind, f"it has more than {kind.max_bytes:,} bytes")


def decoded(body: bytes, url: str, kind: type[D], key: str) -> D:
    """The document that was stored under `key` as `body`, in the newest format.

    Raises:
        DocumentDamagedError, DocumentNewerError: as `read`; the messages name `url`.
    """
    # Bytes that are no document can make json, hashing and pydantic raise nearly anything: RecursionError,
    # OverflowError, AttributeError. None of it is a bug here.
    check_size(len(body), url, kind)
    try:
        fields = json.loads(body)
        _check_depth(fields)
        seal, digest = fields.pop("sha256", None), _digest(fields)
        found = fields.get("format", 1)
        is_sealed = type(found) is not int or found >= kind.sealed_since
        if is_sealed and seal != digest:
            raise ValueError("its sha256 is not the one it holds")
        if type(found) is not int or found < 1:
            raise ValueError("it has no format number")
        if found <= kind.newest_format():
            upgraded = kind.upgraded(fields) if found < kind.newest_format() else fields
            document = kind.model_validate({**upgraded, "format": kind.newest_format(), "sha256": digest})
            document.check(key)
            return document
    except Exception as error:
        raise _damaged(url, kind, _reason(error)) from error
    raise DocumentNewerError(
        f"{url} was written by a newer nightshift (format {found}; this one reads up to {kind.newest_format()}): "
        "update nightshift"
    )


def _read_once(store: Store, key: str, kind: type[D]) -> tuple[D, str]:
    url = store.url(key)
    try:
        body, etag = store.get(key, kind.max_bytes)
    except ObjectTooLargeError:
        raise _damaged(url, kind, f"it has more than {kind.max_bytes:,} bytes") from None
    return decoded(body, url, kind, key), etag


def _check_depth(fields: Any) -> None:
    level = [fields]
    for _ in range(_DEEPEST):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
    if level:
        raise ValueError("its lists and objects lie too deep in each other")


def _damaged(url: str, kind: type[Document], reason: str) -> DocumentDamagedError:
    return DocumentDamagedError(f"{url} is damaged, or not a {kind.title}: {reason}. {kind.if_damaged}")


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """One line without a full stop; pydantic's own has many, and the address of its documentation."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), problem_of(first))))[:_LONGEST_REASON]
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is not JSON"
    if isinstance(error, ValueError | NightshiftError):
        return (str(error).splitlines() or ["it cannot be read"])[0][:_LONGEST_REASON].removesuffix(".")
    return "its fields are not those of one"

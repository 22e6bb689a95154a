"""A document: one small JSON object in the store that is read, checked, and changed by compare-and-swap.

A document holds its own sha256, so that a bit that flips in it, on the wire or at rest, is noticed and not believed.
It also holds the number of its format: an older one is read, and a newer one is refused in so many words.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nightshift.errors import (
    DocumentDamagedError,
    DocumentNewerError,
    NightshiftError,
    ObjectNotFoundError,
    PreconditionFailedError,
)
from nightshift.explain import problem_of
from nightshift.storage.store import Store


class Part(BaseModel):
    """A frozen value inside a document. Fields it does not know are ignored: a later format may add some."""

    model_config = ConfigDict(frozen=True)

    def changed(self, **fields: Any) -> Self:
        """A copy with these fields; their values are not validated."""
        return self.model_copy(update=fields)


class Document(Part):
    """What a stored object says. Each kind has a field `format` whose default is the newest number it can read."""

    title: ClassVar[str]
    """What the object is, for messages: `run record`."""
    if_damaged: ClassVar[str]
    """What a person can do about a damaged one: a whole sentence without its full stop."""
    is_sealed: ClassVar[bool] = True
    """Whether it holds its own sha256."""

    @classmethod
    def newest_format(cls) -> int:
        """The number that is written, and the highest that is read."""
        return int(cls.model_fields["format"].default)

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of an older format, as the newest has them. `format` is still the old number, and is replaced."""
        return fields


D = TypeVar("D", bound=Document)
Changed = TypeVar("Changed", bound=Document | None)


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
        StorageError: it may or may not have been written.
    """
    if etag is None:
        return store.put(key, encoded(document), if_absent=True)
    return store.put(key, encoded(document), if_match=etag)


def change(store: Store, key: str, kind: type[D], change: Callable[[D | None], Changed]) -> Changed:
    """Store what `change` makes of a document, and return that.

    Args:
        change: gets the document as it stands, or None if there is none. It is applied again whenever somebody else
            has changed the document meanwhile, or a response was lost: applied to its own outcome, it must return
            that. Nothing is written where it returns what it got.

    Raises:
        DocumentDamagedError, DocumentNewerError: as `read`.
        StorageError: it may or may not have been written.
    """
    while True:
        found: D | None = None
        etag: str | None = None
        with suppress(ObjectNotFoundError):
            found, etag = read(store, key, kind)
        changed = change(found)
        is_same = changed == found
        if changed is None or is_same:
            return changed
        with suppress(PreconditionFailedError):
            write(store, key, changed, etag)
            return changed


def encoded(document: Document) -> bytes:
    """The JSON that is stored, in the newest format."""
    fields = document.model_dump(mode="json")
    return json.dumps({**fields, "sha256": _digest(fields)} if document.is_sealed else fields, indent=1).encode()


def decoded(body: bytes, url: str, kind: type[D]) -> D:
    """The document that was stored as `body`, in the newest format.

    Raises:
        DocumentDamagedError, DocumentNewerError: as `read`; the messages name `url`.
    """
    # Bytes that are no document can make json, hashing and pydantic raise nearly anything: RecursionError,
    # OverflowError, AttributeError. None of it is a bug here.
    try:
        fields = json.loads(body)
        if kind.is_sealed and fields.pop("sha256", None) != _digest(fields):
            raise ValueError("its sha256 is not the one it holds")
        found = fields.get("format", 1)
        if type(found) is not int or found < 1:
            raise ValueError("it has no format number")
        if found <= kind.newest_format():
            upgraded = kind.upgraded(fields) if found < kind.newest_format() else fields
            return kind.model_validate({**upgraded, "format": kind.newest_format()})
    except Exception as error:
        raise DocumentDamagedError(
            f"{url} is damaged, or not a {kind.title}: {_reason(error)}. {kind.if_damaged}"
        ) from error
    raise DocumentNewerError(
        f"{url} was written by a newer nightshift (format {found}; this one reads up to {kind.newest_format()}): "
        "update nightshift"
    )


def _read_once(store: Store, key: str, kind: type[D]) -> tuple[D, str]:
    body, etag = store.get(key)
    return decoded(body, store.url(key), kind), etag


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """One line without a full stop; pydantic's own has many, and the address of its documentation."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), problem_of(first))))
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is not JSON"
    if isinstance(error, ValueError | NightshiftError):
        return (str(error).splitlines() or ["it cannot be read"])[0]
    return "its fields are not those of one"

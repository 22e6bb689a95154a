"""DOC."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nightshift.errors import ModelNotFoundError, ObjectNotFoundError, StorageError
from nightshift.storage.s3 import S3

MODELS = "models/"


def version_key(name: str, version: str) -> str:
    return f"{MODELS}{name}/{version}/"


def publish_version(store: S3, name: str, version: str, files: Mapping[str, bytes], card: Mapping[str, Any]) -> None:
    """Store a version's files, then its card, which lists them with size and sha256.

    Raises:
        StorageError: something could not be stored; without its card the version does not count.
    """
    prefix = version_key(name, version)
    for file_name, body in files.items():
        store.put(prefix + file_name, body)
    listed = {
        file_name: {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} for file_name, body in files.items()
    }
    store.put_json(prefix + "card.json", {**card, "name": name, "version": version, "files": listed})


def read_card(store: S3, name: str, version: str) -> dict[str, Any]:
    """A published version's card.

    Raises:
        ModelNotFoundError: no such version is published.
    """
    try:
        card: dict[str, Any] = json.loads(store.get(version_key(name, version) + "card.json")[0])
    except ObjectNotFoundError:
        raise ModelNotFoundError(
            f"no version {version!r} of {name} is published in {store.url(MODELS)}. A version is named after its run, "
            "and published when that is finished: `nightshift runs` lists them"
        ) from None
    return card


def read_file(store: S3, card: Mapping[str, Any], file_name: str) -> bytes:
    """One file of a version, after its sha256 was found right.

    Raises:
        StorageError: it cannot be read, or is not what was published.
    """
    key = version_key(card["name"], card["version"]) + file_name
    body = store.download_bytes(key)
    if hashlib.sha256(body).hexdigest() != card["files"].get(file_name, {}).get("sha256"):
        raise StorageError(f"{store.url(key)} is not what was published: its sha256 is not the one in card.json")
    return body

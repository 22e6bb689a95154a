"""Published versions of a model: immutable files under `models/<name>/<version>/`.

A version is named after its run, so that publishing twice writes the same files again. `card.json` is
written last: a version without it is not published.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from nightshift.s3 import S3

PREFIX = "models/"


def version_key(name: str, version: str) -> str:
    return f"{PREFIX}{name}/{version}/"


def publish(store: S3, name: str, version: str, files: Mapping[str, bytes], card: Mapping[str, Any]) -> str:
    """Store a version's files, then its card, which lists them with size and sha256.

    Returns:
        The version's key prefix.

    Raises:
        StorageError: something could not be stored; without its card the version does not count.
    """
    prefix = version_key(name, version)
    for file_name, body in files.items():
        store.put(prefix + file_name, body)
    listed = {
        file_name: {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} for file_name, body in files.items()
    }
    store.put_json(prefix + "card.json", {"name": name, "version": version, **card, "files": listed})
    return prefix

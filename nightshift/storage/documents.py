"""DOC."""

import hashlib
import json
from typing import Any


def sealed(fields: dict[str, Any]) -> bytes:
    """JSON that holds its own sha256."""
    return json.dumps({**fields, "sha256": _digest(fields)}, indent=1).encode()


def unsealed(body: bytes) -> dict[str, Any]:
    """The fields `sealed` was given.

    Raises:
        ValueError, AttributeError: it is not such JSON, or was changed.
    """
    fields: dict[str, Any] = json.loads(body)
    if fields.pop("sha256", None) != _digest(fields):
        raise ValueError("its sha256 is not the one it holds")
    return fields


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

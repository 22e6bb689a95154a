"""What can stand in a file that somebody else has written: values of every kind, anywhere in a document, and bytes."""

import copy
import hashlib
import json
from typing import Any

from hypothesis import strategies as st

NESTED: Any = []
for _ in range(200):
    NESTED = [NESTED]

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -1e308, 0.1),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "x" * 10_000, "\x1b[2J", "a\rb\nc", "\u202e", "\ud800", "\x00", "[/red]", "[link=file:///etc/passwd]x"),
    *("$\\frac{$", '=HYPERLINK("http://x")', "|", "<script>", "../../etc/passwd", "/", "s3://other/key", "0" * 64),
    *("9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00+14:00", "2026-02-30T00:00:00Z", "running", "finished"),
    *([], {}, NESTED, {"a": {"b": {}}}, [0] * 1000, [{}] * 100),
]


@st.composite
def documents(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with one to three places replaced, removed, renamed or filled from another place."""
    changed = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            return copy.deepcopy(draw(st.sampled_from(VALUES)))
        parent, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(("replace", "replace", "replace", "remove", "copy", "wrap")))
        if what == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "remove":
            del parent[key]
        elif what == "copy":
            other, where = draw(st.sampled_from(places))
            parent[key] = copy.deepcopy(other[where])
        else:
            parent[key] = [parent[key]]
    return changed


@st.composite
def bytes_of(draw: st.DrawFn, whole: bytes) -> bytes:
    """Some bytes with up to five cuts, insertions, repetitions and flipped bits."""
    body = bytearray(whole)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(len(body) - 1, 0)))
        length = draw(st.sampled_from((1, 2, 8, 100, 5000)))
        what = draw(st.sampled_from(("flip", "cut", "insert", "repeat", "end")))
        if what == "flip" and body:
            body[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del body[at : at + length]
        elif what == "insert":
            body[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif what == "repeat":
            body[at:at] = body[at : at + length]
        else:
            del body[at:]
    return bytes(body)


def sealed(document: Any) -> bytes:
    """The JSON of a document with the sha256 that it should have: whoever can write to the bucket can do that."""
    if not isinstance(document, dict):
        return json.dumps(document).encode()
    fields = {name: value for name, value in document.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps({**fields, "sha256": digest}).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value, as the container and the key in it."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        parent = waiting.pop()
        keys: Any = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        for key in keys:
            found.append((parent, key))
            waiting.append(parent[key])
    return found

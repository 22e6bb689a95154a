"""DOC."""

import difflib

from pydantic_core import ErrorDetails


def _explain(detail: ErrorDetails) -> str:
    allowed = detail.get("ctx", {}).get("expected")
    if detail["type"] == "literal_error":
        return f"allowed are {allowed}"
    message = detail["msg"]
    return message.removeprefix("Value error, ").removeprefix("Input ")


def _near_miss(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""

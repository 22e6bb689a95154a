"""What pydantic found wrong with a user's value, in words a user understands."""

import difflib
from collections.abc import Iterable

from pydantic_core import ErrorDetails


def problem_of(detail: ErrorDetails) -> str:
    """One problem as a phrase, such as "allowed are 'auto' or 'cpu'"."""
    if detail["type"] == "literal_error":
        return f"allowed are {detail.get('ctx', {}).get('expected')}"
    return detail["msg"].removeprefix("Value error, ").removeprefix("Input ")


def near_miss(name: str, known: Iterable[str]) -> str:
    """ " Did you mean …?" if a known name is close to this one, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""

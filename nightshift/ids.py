"""DOC."""

import re
import secrets
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator

from nightshift.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def parse_run_id(text: str) -> str:
    """`text` if it can name a run, which makes it part of object keys.

    Raises:
        ConfigError: it has a character other than letters, digits, '.', '_' and '-', or '..' in it.
    """
    if not _RUN_ID.fullmatch(text) or ".." in text:
        raise ConfigError(
            f"run id {text!r} is not valid: use up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit and without '..'"
        )
    return text


def durable_run_id(run_id: str | None, label: str, scheduled: datetime, flow_run_id: str) -> str:
    """The id of the run that a flow run trains, the same however often it is started.

    Args:
        run_id: may have {date} in it, which stands for the day the flow run is scheduled for; none: one is made.
        label: what a made one begins with.

    Raises:
        ConfigError: it is not a run id.
    """
    made = f"{label}-{scheduled:%Y%m%d}-{flow_run_id[:8]}"
    return parse_run_id(run_id.replace("{date}", f"{scheduled:%Y-%m-%d}") if run_id else made)


def new_run_id(recipe: str, now: datetime) -> str:
    """A run id nobody else has: recipe, day and eight random characters."""
    return f"{recipe}-{now:%Y%m%d}-{secrets.token_hex(4)}"


def _sha256(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ValueError("not a sha256 in hexadecimal")
    return text


RunId = Annotated[str, AfterValidator(parse_run_id)]
Sha256 = Annotated[str, AfterValidator(_sha256)]

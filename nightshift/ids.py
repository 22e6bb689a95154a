"""Names that become part of object keys: which are valid, and how new ones are made."""

import re
import secrets
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator

from nightshift.errors import ConfigError

RUN_ID = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|(?<!\.)\.){0,99}"
"""Of a run id, as a pattern for a part of a key."""
DATASET = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
"""Of a data set's name: shorter than a sha256, which names a packed data set under the same prefix."""
_OURS = "cifar10"
_TAKEN = "shards"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def parse_run_id(text: str) -> str:
    """`text`, if it can name a run.

    Raises:
        ConfigError: it is not 1 to 100 letters, digits, '.', '_' and '-', begins with neither a letter nor a
            digit, or contains '..'.
    """
    if not re.fullmatch(RUN_ID, text):
        raise ConfigError(
            f"run id {text!r} is not valid: use up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit and without '..'"
        )
    return text


def parse_dataset_name(text: str) -> str:
    """`text`, if it can name a data set.

    Raises:
        ConfigError: it is not 1 to 63 letters, digits, '_' and '-', beginning with a letter or a digit, or is taken.
    """
    if not re.fullmatch(DATASET, text) or text == _TAKEN:
        raise ConfigError(
            f"data set {text!r} is not a valid name: use up to 63 letters, digits, '_' and '-', beginning with a "
            f"letter or a digit, and not {_TAKEN}"
        )
    return text


def parse_own_dataset_name(text: str) -> str:
    """`text`, if it can name a data set of the user's own; raises ConfigError if it cannot."""
    if text == _OURS:
        raise ConfigError(f"data set {text!r} is nightshift's own: give yours another name")
    return parse_dataset_name(text)


def durable_run_id(run_id: str | None, label: str, scheduled: datetime, flow_run_id: str) -> str:
    """The id of the run that a flow run trains. It is the same however often the flow run is started.

    Args:
        run_id: may contain {date}, which stands for the day the flow run is scheduled for. None: an id is made.
        label: what a made id begins with.

    Raises:
        ConfigError: the result is not a valid run id.
    """
    made = f"{label}-{scheduled:%Y%m%d}-{flow_run_id[:8]}"
    return parse_run_id(run_id.replace("{date}", f"{scheduled:%Y-%m-%d}") if run_id else made)


def new_run_id(recipe: str, now: datetime) -> str:
    """A run id nobody else has: recipe, day and twelve random characters."""
    return f"{recipe}-{now:%Y%m%d}-{secrets.token_hex(6)}"


def _sha256(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ValueError("not a sha256 in hexadecimal")
    return text


def _uuid(text: str) -> str:
    if not _UUID.fullmatch(text):
        raise ValueError("not the id of a flow run")
    return text


RunId = Annotated[str, AfterValidator(parse_run_id)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
DatasetName = Annotated[str, AfterValidator(parse_dataset_name)]
FlowRunId = Annotated[str, AfterValidator(_uuid)]

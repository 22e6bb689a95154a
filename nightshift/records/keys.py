"""Where in the bucket a run keeps its things. docs/storage.md has them all."""

from nightshift.ids import parse_run_id

RECORDS = "runs/"
PAYLOADS = "checkpoints/"
REPORTS = "reports/"


def record_key(run_id: str) -> str:
    """The key of a run's record; raises ConfigError if the run id is not valid."""
    return f"{RECORDS}{parse_run_id(run_id)}.json"


def payload_key(run_id: str, step: int, token: int) -> str:
    """The key of the payload that the holder of a fencing token writes at a step; nobody else writes it."""
    return f"{PAYLOADS}{run_id}/{step}-{token}.pt"


def report_key(run_id: str, file_name: str) -> str:
    return f"{REPORTS}{run_id}/{file_name}"


def is_written_under(key: str, token: int) -> bool:
    """Whether a payload's key is one that the holder of this fencing token may write."""
    return key.startswith(PAYLOADS) and key.endswith(f"-{token}.pt")

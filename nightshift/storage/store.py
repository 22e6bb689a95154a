"""DOC."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Stored:
    """An object's name, size in bytes, ETag and time of last write."""

    key: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted."""

    key: str
    upload_id: str
    started: datetime

"""What a value in a stored object may be.

Whoever can write to the bucket can seal a document, because its sha256 is no signature. So each value is bounded:
nothing that is computed from it, or shown of it, can overflow, and no name leads elsewhere.
"""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field

FROZEN = ConfigDict(frozen=True, allow_inf_nan=False, str_max_length=10_000)
"""Of every class that is read from the store. The bound on text holds for the fields that have none of their own."""
_LONGEST_TEXT = 10_000


def _moment(value: datetime) -> datetime:
    if not 2000 <= value.year < 3000:  # else adding a zone's offset or a pause to it may leave the calendar
        raise ValueError("should be a time from the year 2000 to 2999")
    return value.astimezone(UTC)


Moment = Annotated[AwareDatetime, AfterValidator(_moment)]
"""A time in UTC."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A number of things; exact as a float too."""
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]
Number = Annotated[float, Field(ge=-1e38, le=1e38)]
"""What training computes, in float32."""
Loss = Annotated[float, Field(allow_inf_nan=True)]
"""Of a test: that of a diverged model is no number. It is only ever shown."""
Line = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text without control characters."""
Text = Annotated[str, Field(max_length=2**24), AfterValidator(lambda text: text[:_LONGEST_TEXT])]
"""A message, in several lines perhaps. The rest of a very long one is left out."""
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 512
ImageSize = Annotated[int, Field(ge=SMALLEST_IMAGE, le=LARGEST_IMAGE)]
"""The side of the images a network is trained on, in pixels: they are squares."""
MOST_CLASSES = 100_000
LONGEST_CLASS_NAMES = 8_000_000
"""How many bytes the names of a data set's classes may have together, as JSON: a card and a report hold them all."""
LARGEST_EVALUATION = 32 * 1024 * 1024
"""Bytes of a run's `evaluation.json`: of 100,000 classes with long names it has 24 MB."""
LONGEST_CLASS_NAME = 1000
ClassName = Annotated[str, Field(max_length=LONGEST_CLASS_NAME)]
"""Any text: a folder's name, or what somebody has typed into a table."""
Resize = Literal["crop", "pad", "stretch"]
"""How an image that is no square becomes one: `data.images.fit` says what each does."""
Storage = Literal["pixels", "encoded"]
"""How the images of a snapshot lie in its shards: as uint8 pixels, or as JPEG."""

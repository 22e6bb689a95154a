"""What every source of images has to do, and what it knows of an image before it is read."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Listed(NamedTuple):
    """One image of a source.

    `id` is its name, by which it is known from night to night: its path below the source's root. `place` is where the
    source finds it. `hint` differs when its content may: size and time, or size and ETag. An empty `split` or `group`
    says nothing. `extra` is a JSON object of the team's own columns, or empty. `refused` is the reason why the image
    cannot be used, where the listing knows already.
    """

    id: str
    place: str
    hint: str
    label: str
    size: int = 0
    split: str = ""
    group: str = ""
    extra: str = ""
    refused: str = ""


ROW = "\0row "
"""The prefix of `place` for an image that lies in a row of its table. Such rows are read in their order."""


class Source(Protocol):
    """Images and what is known of each. A source is pickled: each process that reads has its own copy."""

    @property
    def readers(self) -> int:
        """How many threads of a process should read at once: several where each read waits for a network."""

    def list(self) -> Iterator[Listed]:
        """Every image, once, in any order, without reading any.

        Raises:
            SourceError: the source is not there, or is not what it has to be.
            StorageError: its bucket cannot be listed. What was listed until then counts for nothing.
        """

    def read(self, listed: Listed) -> bytes:
        """The image's file.

        Raises:
            UnreadableImageError: this one cannot be read, or is not as it was listed.
            StorageError: none can be read at the moment.
        """

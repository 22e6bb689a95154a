"""Images in one folder a class, perhaps below `train/`, `validation/` and `test/`."""

from collections.abc import Iterator
from dataclasses import dataclass
from posixpath import splitext

from nightshift import progress
from nightshift.data.images import SUFFIXES
from nightshift.data.sources.files import Files
from nightshift.data.sources.listed import Listed
from nightshift.errors import NoImagesError

SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"test": "test"}


@dataclass(frozen=True)
class ClassFolders:
    """A root whose first folders name the classes, or the splits and below them the classes.

    They name splits if all of them are called as one and have folders in them: `test` beside `cat` is a class.
    """

    files: Files

    @property
    def readers(self) -> int:
        return self.files.readers

    def list(self) -> Iterator[Listed]:
        depth = 2 if (by_split := self._is_by_split()) else 1
        found = loose = 0
        for file in self.files.walk():
            parts = file.name.split("/")
            if splitext(file.name)[1].lower() not in SUFFIXES:
                continue
            if len(parts) <= depth:
                loose += 1
                continue
            found += 1
            split = SPLITS[parts[0].lower()] if by_split else ""
            refused = "" if file.hint else "it cannot be looked at: a link that leads nowhere, or no permission"
            yield Listed(file.name, file.name, file.hint, parts[depth - 1], file.size, split, refused=refused)
        if loose:
            progress.current().warn(f"{self.files.url('')}: {loose:,} images lie in no folder of a class: left out")
        if not found:
            raise NoImagesError(
                f"{self.files.url('')} has no images ({', '.join(sorted(SUFFIXES))}) in folders: put one folder a "
                "class there, or name a table of labels"
            )

    def read(self, listed: Listed) -> bytes:
        return self.files.read(listed.place, listed.hint)

    def _is_by_split(self) -> bool:
        firsts = self.files.folders()
        return bool(firsts) and all(first.lower() in SPLITS and self.files.folders(f"{first}/") for first in firsts)

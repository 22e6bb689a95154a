"""Images and labels from a table: CSV, JSON Lines or Parquet.

The column `image` has a path relative to the table, an absolute one, an s3:// address, or, in Parquet, the bytes
themselves (`bytes` or `image.bytes`, as Hugging Face stores them); `label` has the class. The columns `split` and
`group` are optional. All others are the team's own, and are kept.
"""

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet
from pyarrow import json as json_lines

from nightshift.data.sources.buckets import Buckets
from nightshift.data.sources.files import File, Files, LocalFiles, Seen
from nightshift.data.sources.folder import SPLITS
from nightshift.data.sources.listed import ROW, Listed
from nightshift.errors import NoImagesError, SourceError, UnreadableImageError

TABLES = (".csv", ".jsonl", ".parquet")
_ROWS, _ROWS_WITH_IMAGES = 10_000, 100
"""How many rows are looked at together."""
_LOCK = Lock()
_OURS = ("image", "label", "split", "group")


@dataclass(frozen=True)
class Table:
    """A table `name` among `files`; the images it names are found from there, or in `buckets`.

    `by` is the column that groups them.
    """

    files: Files
    name: str
    buckets: Buckets
    by: str = ""

    @property
    def readers(self) -> int:
        return self.files.readers

    def list(self) -> Iterator[Listed]:
        start, seen = 0, Seen()
        for batch in _batches(self.files.on_disk(self.name), self.files.url(self.name)):
            self._check_columns(batch.schema.names)
            rows = batch.to_pylist()
            yield from self._listed(rows, start, seen)
            start += len(rows)
        if not start:
            raise NoImagesError(f"{self.files.url(self.name)} has no rows: write one an image")

    def read(self, listed: Listed) -> bytes:
        if not listed.place.startswith(ROW):
            return self._files_of(listed.place).read(listed.place, listed.hint)
        body = self._bytes_of_row(int(listed.place.removeprefix(ROW)))
        if hashlib.sha256(body).hexdigest() != listed.hint:
            raise UnreadableImageError("it changed while it was read")
        return body

    def _listed(self, rows: Sequence[dict[str, Any]], start: int, seen: Seen) -> Iterator[Listed]:
        names = [_image_of(row) for row in rows]
        paths = {name: self._path(name) for name in names if isinstance(name, str)}
        found = self._find({path for path in paths.values() if path}, seen)
        for number, (row, name) in enumerate(zip(rows, names, strict=True), start):
            label, reason = _label_of(row)
            split, reason = _split_of(row, reason)
            more = {
                "label": label,
                "split": split,
                "group": _text(row.get(self.by or "group")),
                "extra": _extra_of(row),
            }
            if isinstance(name, bytes):
                place = row["image"].get("path") if isinstance(row.get("image"), Mapping) else None
                sha256 = hashlib.sha256(name).hexdigest()
                yield Listed(
                    str(place or f"row {number}"), f"{ROW}{number}", sha256, size=len(name), refused=reason, **more
                )
                continue
            path = paths.get(name or "", "")
            file = found.get(path)
            if not name:
                reason = "it has no path"
            elif not path:
                reason = "it leads out of the table's folder: write an absolute path, or move the table"
            elif not file and not reason:
                reason = "there is no such file"
            yield Listed(
                path or name or f"row {number}",
                path,
                file.hint if file else "",
                size=file.size if file else 0,
                refused=reason,
                **more,
            )

    def _files_of(self, path: str) -> Files:
        return self.buckets.of(path) if path.startswith("s3://") else self.files

    def _find(self, paths: Iterable[str], seen: Seen) -> dict[str, File]:
        in_buckets, others = (
            [path for path in paths if path.startswith("s3://") is is_in_bucket] for is_in_bucket in (True, False)
        )
        found = self.files.find(others, seen)
        for path in in_buckets:
            found |= self.buckets.of(path).find([path], seen)
        return found

    def _path(self, name: str) -> str:
        """The name by which the image is found and known: relative to the table where it can be; '' if it may not."""
        root = self.files.url("").rstrip("/")
        if name.startswith(f"{root}/"):
            name = name.removeprefix(f"{root}/")
        if name.startswith("s3://"):
            return name if name.removeprefix("s3://").partition("/")[0] else ""
        if "://" in name or name.startswith("/"):
            # A table in a bucket names no file of whoever reads it.
            return name if isinstance(self.files, LocalFiles) else ""
        path = posixpath.normpath(name)
        return "" if path.startswith("..") or "\0" in path else path

    def _check_columns(self, names: Sequence[str]) -> None:
        url = self.files.url(self.name)
        has = ", ".join(names)
        if not {"image", "bytes", "image.bytes"} & set(names):
            raise SourceError(
                f"{url} has no column `image`; it has: {has}. Give the paths of the images in one so named"
            )
        if "label" not in names:
            raise SourceError(f"{url} has no column `label`; it has: {has}. Give the classes in one so named")
        if self.by and self.by not in names:
            raise SourceError(f"{url} has no column {self.by!r}, by which images are to be grouped; it has: {has}")

    def _bytes_of_row(self, number: int) -> bytes:
        path, start = self.files.on_disk(self.name), 0
        with _LOCK:
            metadata = parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if number < start + rows and isinstance(body := _row_group(path, group)[number - start], bytes):
                    return body
                start += rows
        raise UnreadableImageError("it is gone since it was listed")


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int) -> list[str | bytes | None]:
    """The images of one row group; images are read in the order of the rows, so it is read once."""
    return [_image_of(row) for row in parquet.ParquetFile(path).read_row_group(group).to_pylist()]


def _batches(path: Path, url: str) -> Iterator[pa.RecordBatch]:
    try:
        batches = _reader(path)
        first = list(islice(batches, 1))
        yield from chain(first, batches)
    except (pa.ArrowException, OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise SourceError(f"{url} cannot be read as a table: {str(error).splitlines()[0]}") from None


def _reader(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix.lower() == ".csv":
        # As text: a class may be called 007, and 1.0 is not 1.
        columns = csv.open_csv(path).schema.names
        text = csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False)
        yield from csv.open_csv(path, convert_options=text)
    elif path.suffix.lower() == ".jsonl":
        yield from json_lines.open_json(path)
    else:
        file = parquet.ParquetFile(path)
        has_bytes = any(
            column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE" for column in file.schema
        )
        yield from file.iter_batches(_ROWS_WITH_IMAGES if has_bytes else _ROWS)


def _image_of(row: Mapping[str, Any]) -> str | bytes | None:
    """An image's path or bytes."""
    image = row.get("image")
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    for name in ("bytes", "image.bytes"):
        image = row.get(name) or image
    return image if isinstance(image, str | bytes) else None


def _label_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """The class, or '' and the reason why there is none."""
    label = _text(row["label"]).strip()
    if not label or label.lower() in ("nan", "null", "none"):
        return "", "it has no label"
    return label, ""


def _split_of(row: Mapping[str, Any], reason: str) -> tuple[str, str]:
    split = _text(row.get("split")).strip().lower()
    if split and split not in SPLITS:
        return "", reason or f"its split is {split!r}, and not one of train, validation and test"
    return SPLITS.get(split, ""), reason


def _extra_of(row: Mapping[str, Any]) -> str:
    extra = {
        name: value
        for name, value in row.items()
        if name not in (*_OURS, "bytes", "image.bytes") and isinstance(value, str | int | float | bool)
    }
    return json.dumps(extra, sort_keys=True, ensure_ascii=False) if extra else ""


def _text(value: object) -> str:
    if value is None or value != value:  # NaN
        return ""
    return str(value)

"""Tonight's images as a snapshot: list, read what is new, divide, check, and commit.

    listing = what the source has tonight
    known   = rows of the last snapshot, and of parts that an interrupted one has left, with the same name and hint
    new     = listing - known, in parts of some thousand images
    for each part: read, decode, upload one shard, then the part's rows
    rows    = known + new; under several labels: refused; split = f(group)
    upload rows, then the manifest; append to the history; delete the parts

Listing and snapshot are tables of Arrow, so a million images take some hundred megabytes.
"""

import io
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
from pyarrow import compute

from nightshift import progress
from nightshift.config.project import DatasetConfig
from nightshift.data import rows as table
from nightshift.data.decode import Decoders, Shape, prepare
from nightshift.data.names import check_classes
from nightshift.data.parts import Reader, in_parts, listed_of, mixed, part_key, pending, read_parts, unknown
from nightshift.data.rows import LISTED, READ, ROWS
from nightshift.data.rules import CONFLICT, classes_of, findings_of
from nightshift.data.sources.listed import Listed, Source
from nightshift.data.sources.places import open_source
from nightshift.data.split import split_of
from nightshift.data.stored import UNUSABLE, lying_as_before, read_rows, shape_of
from nightshift.errors import (
    ConfigError,
    DatasetRejectedError,
    NoImagesError,
)
from nightshift.records import snapshots
from nightshift.records.snapshots import SPLITS, Entry, History, Manifest
from nightshift.refs import Finding, SnapshotRef
from nightshift.storage.store import Store
from nightshift.text import is_utf8, plain
from nightshift.values import LONGEST_CLASS_NAME, SMALLEST_IMAGE

_LISTED_AT_ONCE = 10_000
_FIRST = 100
"""How many images decide the size at which all are stored, where the data set does not."""
_LARGEST_AUTO = 128
_MOST_PIXELS = 4 * 1024**3
"""Bytes of all images as pixels, up to which they are stored so by default."""
_NAMED = 5
"""How many of the images that are left out are named on the way."""


@dataclass(frozen=True)
class Look:
    """What a source has tonight, read and divided, and what the rules say of it."""

    rows: pa.Table
    shape: Shape
    before: pa.Table | None
    """The last snapshot: the images it had, the class of each, and whether it was left out."""
    new: pa.Table
    """The part of the listing that was read."""
    findings: list[Finding]
    parts: list[str]
    """The keys of what an interrupted snapshot has left."""
    newest: str | None
    """The digest of the last snapshot."""


def look_at(
    store: Store, name: str, config: DatasetConfig, reader: Reader | None = None, source: Source | None = None
) -> Look:
    """List a source and read what is new since the last snapshot.

    Args:
        reader: what reads, and stores what was read. Without one it is read here, and nothing is stored.
        source: it is read whole, whatever is known of it. Without one, what is new in the source that `config` names.

    Raises:
        NoImagesError, SourceError: the source has nothing to offer, or is not what it has to be.
        StorageError: the source or the store does not answer. What was kept is not read again.
    """
    prepare()  # beside the listing, if also in vain where nothing is new
    history = snapshots.read_history(store, name)
    newest = None if source else _stored(store, history, history.newest)
    source = source or open_source(config, store)
    listing = _listing(source)
    shape = _shape(config, source, listing, newest)
    parts = pending(store, name, shape)
    known = [_together(parts.values())]
    if newest and newest[0] == shape:
        known.insert(0, _readable(newest[1]))
    new = mixed(unknown(listing, known), shape)
    known.append(
        _together(reader(store, name, source, shape, new) if reader else read_parts(None, name, source, shape, new))
    )
    rows, before = _joined(listing, known), _compared(newest)
    accepted = before
    if history.accepted != history.newest:
        accepted = _compared(_stored(store, history, history.accepted))
    del listing, known, newest  # each is as large as tonight's rows
    rows = _divided(rows, config)
    unfit = [Finding(rule="fit", ok=False, detail=reason)] if (reason := _unfit(rows)) else []
    findings = unfit + findings_of(rows, accepted, config.rules)
    last = history.newest.digest if history.newest else None
    return Look(rows, shape, before, new, findings, list(parts), last)


def make_snapshot(
    store: Store, name: str, config: DatasetConfig, reader: Reader = read_parts, source: Source | None = None
) -> SnapshotRef:
    """Tonight's snapshot of a data set, in the store and in its history.

    Rules that are broken raise nothing: they are in the snapshot's findings.

    Args:
        reader: what reads the new images, on this machine or on others.
        source: as of `look_at`.

    Raises:
        DatasetRejectedError: there is nothing to train on, or to test with.
        NoImagesError, SourceError, StorageError: as `look_at`.
    """
    started = time.monotonic()
    look = look_at(store, name, config, reader, source)
    for finding in look.findings:
        if finding.rule == "fit":
            raise DatasetRejectedError(f"{name} cannot be trained on: {finding.detail}")
    manifest = _manifest(name, look.rows, look.shape)
    rows = look.rows
    if len(look.new) or manifest.digest != look.newest:  # else they are the stored rows
        rows = lying_as_before(store, manifest, rows)
    added, removed, relabelled = difference(look.before, look.rows)
    entry = Entry(
        digest=manifest.digest,
        at=store.now(),
        images=manifest.images,
        classes=len(manifest.classes),
        added=len(added),
        removed=len(removed),
        relabelled=len(relabelled),
        refused=manifest.refused,
        read=len(look.new),
        findings=look.findings,
    )
    store.upload(snapshots.rows_key(name, manifest.digest), io.BytesIO(table.as_parquet(rows, look.shape)))
    snapshots.write_manifest(store, manifest)
    snapshots.append(store, name, entry)
    for key in [*look.parts, *(part_key(name, part, look.shape) for part in in_parts(look.new, look.shape))]:
        store.delete(key)
    made = _ref(name, entry, time.monotonic() - started)
    _tell(made, look.rows)
    return made


def stored_snapshot(store: Store, name: str, digest: str) -> SnapshotRef:
    """An earlier snapshot, by its digest or the beginning of it; raises SourceError if it is not exactly one."""
    return _ref(name, snapshots.read_history(store, name).find(digest), 0)


def check_rules(snapshot: SnapshotRef) -> None:
    """Raise DatasetRejectedError, which says what to do, if a snapshot breaks a rule that stops the night."""
    broken = [finding for finding in snapshot.findings if not finding.ok]
    for finding in snapshot.findings:
        progress.current().warn(f"{snapshot.name}: {finding.detail}")
    if broken:
        rules = ", ".join(f'{finding.rule} = "warn"' for finding in broken)
        raise DatasetRejectedError(
            f"tonight's images of {snapshot.name} are not trained on: "
            f"{'; '.join(finding.detail for finding in broken)}. "
            f"Mend them; or, if it is meant to be so, set {rules} in [datasets.{snapshot.name}.rules] for a night"
        )


def difference(before: pa.Table | None, after: pa.Table) -> tuple[list[str], list[str], list[str]]:
    """The ids of the images that are used after and not before, before and not after, and under another label."""
    new = table.kept(after, "id", "label")
    if before is None:
        return new["id"].to_pylist(), [], []
    old = table.kept(before, "id", "label")
    at = compute.index_in(new["id"], value_set=old["id"])
    added = new["id"].filter(compute.is_null(at)).to_pylist()
    removed = old["id"].filter(compute.invert(compute.is_in(old["id"], value_set=new["id"]))).to_pylist()
    # Unequal is null, and so left out, where there was none.
    relabelled = new["id"].filter(compute.not_equal(new["label"], old["label"].take(at))).to_pylist()
    return added, removed, relabelled


def _ref(name: str, entry: Entry, seconds: float) -> SnapshotRef:
    return SnapshotRef(name=name, seconds=seconds, **entry.model_dump(exclude={"at", "classes"}))


def _tell(made: SnapshotRef, rows: pa.Table) -> None:
    """Say what was found, and name the first images that are left out."""
    progress.current().say(
        f"snapshot {made.digest[:12]} of {made.name}: {made.images:,} images, {made.added:,} added, {made.removed:,} "
        f"removed, {made.relabelled:,} relabelled, {made.refused:,} left out; {made.read:,} read, {made.seconds:,.1f} s"
    )
    for name, reason in islice(refusals_of(rows), _NAMED):
        progress.current().warn(f"left out: {name}: {reason}")
    if made.refused > _NAMED:
        progress.current().warn(f"{made.refused - _NAMED:,} more are left out: nightshift data check names all")


def _listing(source: Source) -> pa.Table:
    """All that the source has, sorted by id, each once."""
    batches, images = [], source.list()
    with progress.current().transfer("listing the images", None):
        while some := list(islice(images, _LISTED_AT_ONCE)):
            columns = zip(*map(_as_row, some), strict=True)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, LISTED, strict=True)]
            batches.append(pa.record_batch(arrays, LISTED))
    listing = pa.Table.from_batches(batches, LISTED)
    names = listing["id"]
    if compute.all(compute.less(names[:-1], names[1:])).as_py():  # as buckets list
        return listing
    return _each_once(listing.sort_by("id"))


def _as_row(listed: Listed) -> tuple[Any, ...]:
    name, place, label, group, refused = listed.id, listed.place, listed.label, listed.group, listed.refused
    if not is_utf8(name + place):
        name, place, refused = plain(name), "", "its name is not UTF-8: rename it"
    if not (is_utf8(label) and label.isprintable() and len(label) <= LONGEST_CLASS_NAME):
        label, refused = "", refused or "its label is too long, or has characters that cannot be shown"
    return name, place, listed.hint, listed.size, label, listed.split, plain(group), listed.extra, refused


def _each_once(listing: pa.Table) -> pa.Table:
    """A listing in which an image that is named twice stands once: under its label, or refused if it has two."""
    counted = listing.group_by("id").aggregate([([], "count_all"), ("label", "count_distinct")])
    twice = counted.filter(compute.greater(counted["count_all"], 1))
    if not len(twice):
        return listing
    torn = set(twice.filter(compute.greater(twice["label_count_distinct"], 1))["id"].to_pylist())
    seen, keep, refused = "", list[bool](), list[str]()
    for name, reason in table.iterate(listing, "id", "refused"):
        keep.append(name != seen or not len(keep))
        refused.append(reason or (CONFLICT if name in torn else ""))
        seen = name
    return table.with_columns(listing, {"refused": refused}).filter(pa.array(keep))


def _stored(store: Store, history: History, entry: Entry | None) -> tuple[Shape, pa.Table] | None:
    """How a snapshot's images are stored, and its rows. One that is damaged costs a night that reads all anew."""
    if not entry:
        return None
    try:
        manifest, rows = read_rows(store, history.name, entry.digest)
    except UNUSABLE as error:
        progress.current().warn(f"the last snapshot of {history.name} cannot be used, so all is read anew: {error}")
        return None
    return shape_of(manifest), rows


def _shape(config: DatasetConfig, source: Source, listing: pa.Table, newest: tuple[Shape, pa.Table] | None) -> Shape:
    """How images are stored: as the data set says, else as they were before, else as the first ones and all are."""
    size = config.image_size
    if size == "auto":
        size = newest[0].size if newest else _usual_side(source, listing)
    storage = config.storage
    if storage == "auto":
        storage = newest[0].storage if newest else "pixels"
        if not newest and len(listing) * Shape(size, config.resize).bytes > _MOST_PIXELS:
            storage = "encoded"
            progress.current().say(f"images are stored as JPEG, as {len(listing):,} are many (storage sets it)")
    return Shape(size, config.resize, storage)


def _usual_side(source: Source, listing: pa.Table) -> int:
    """The median of the shorter sides of the first images, within limits."""
    first = listing.filter(compute.equal(listing["refused"], "")).slice(0, _FIRST)
    with Decoders(source, Shape(SMALLEST_IMAGE, "stretch"), processes=1) as decoders:
        images = list(decoders.read(listed_of(first)))
    sides = [min(image.width, image.height) for image in images if not image.refused]
    if not sides:
        unreadable = zip(first["id"].to_pylist(), (image.refused for image in images), strict=True)
        raise NoImagesError(
            f"none of the first images can be read ({_some([*refusals_of(listing), *unreadable])}): mend them, or set "
            "image_size in nightshift.toml if others can"
        )
    size = min(max(statistics.median_low(sides), SMALLEST_IMAGE), _LARGEST_AUTO)
    progress.current().say(
        f"images are stored as {size} x {size} pixels, as the first ones are (image_size sets another)"
    )
    return size


def _together(tables: Iterable[pa.Table]) -> pa.Table:
    """What was read, as one table."""
    return pa.concat_tables([READ.empty_table(), *(part.select(READ.names) for part in tables)])


def _readable(rows: pa.Table) -> pa.Table:
    """What is known of a snapshot's images. What could not be read is tried again, and so is what nobody has read."""
    is_known = compute.is_valid(rows["pixels"])
    known = rows.select(READ.names)
    return known if compute.all(is_known).as_py() else known.filter(is_known)


def _compared(stored: tuple[Shape, pa.Table] | None) -> pa.Table | None:
    """What tonight's rows are compared with."""
    return stored and stored[1].select(["content", "id", "label", "refused"])


def _joined(listing: pa.Table, known: list[pa.Table]) -> pa.Table:
    """A listing, and what is known of each image."""
    places, read = table.places_of(listing, known), pa.concat_tables(known)
    for name in READ.names[2:]:
        listing = listing.append_column(name, read[name].take(places))
    return listing.select(ROWS.names).cast(ROWS)


def _divided(rows: pa.Table, config: DatasetConfig) -> pa.Table:
    """The rows of tonight's snapshot: the split of each image, and why it is left out if it is."""
    unreadable = [was or reason or "" for was, reason in table.iterate(rows, "refused", "unreadable")]
    torn = _torn(rows, unreadable)
    splits, refused = [], []
    for (content, group, split), reason in zip(
        table.iterate(rows, "content", "group", "split"), unreadable, strict=True
    ):
        reason = reason or torn.get(content, "")
        refused.append(reason)
        splits.append("" if reason else split or split_of(group.encode() or content, config.split))
    unreadable = ["" if reason.startswith(CONFLICT) else reason for reason in unreadable]
    return table.with_columns(rows, {"split": splits, "refused": refused, "unreadable": unreadable})


def _torn(rows: pa.Table, unreadable: list[str]) -> dict[bytes, str]:
    """The contents that stand under several labels, each with the reason to leave all its copies out."""
    used = rows.select(["content", "label"]).filter(pa.array([not reason for reason in unreadable], pa.bool_()))
    counted = table.repeated(used, "content").group_by("content")
    counted = counted.aggregate([("label", "count_distinct"), ("label", "min"), ("label", "max")])
    several = counted.filter(compute.greater(counted["label_count_distinct"], 1))
    return {
        content: f"{CONFLICT}: {first}, {last}"
        for content, first, last in table.iterate(several, "content", "label_min", "label_max")
    }


def _unfit(rows: pa.Table) -> str:
    """Why nothing can be trained on these images at all, or ''."""
    counts = classes_of(rows)
    splits = compute.unique(table.kept(rows, "split")["split"]).to_pylist()
    if not counts:
        return f"none of its {len(rows):,} images can be used ({_some(refusals_of(rows))})"
    if len(counts) == 1:
        return f"all its images are of one class, {next(iter(counts))}: put those of another into a folder of their own"
    try:
        check_classes(list(counts))
    except ConfigError as error:
        return str(error)
    for split in ("train", "test"):
        if split not in splits:
            return f"no image is in the split {split!r}: add images, or change [datasets.NAME.split]"
    return ""


def _some(refusals: Iterable[tuple[str, str]]) -> str:
    """The first few, with their reasons."""
    return "; ".join(f"{name}: {reason}" for name, reason in islice(refusals, 3))


def refusals_of(rows: pa.Table) -> Iterator[tuple[str, str]]:
    """The images that are left out, each with its reason."""
    for name, reason in table.iterate(rows, "id", "refused"):
        if reason:
            yield name, reason


def _manifest(name: str, rows: pa.Table, shape: Shape) -> Manifest:
    used = table.kept(rows, "split", "shard")
    return Manifest(
        name=name,
        digest=table.digest_of(rows, shape),
        test_digest=table.digest_of(rows, shape, "test"),
        image_size=shape.size,
        resize=shape.resize,
        storage=shape.storage,
        images=len(used),
        splits={split: compute.sum(compute.equal(used["split"], split)).as_py() or 0 for split in SPLITS},
        classes=classes_of(rows),
        refused=len(rows) - len(used),
        shards=sorted(value.hex() for value in compute.unique(used["shard"]).to_pylist()),
    )

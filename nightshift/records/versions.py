"""Published versions of a model: immutable files under `models/<name>/<version>/`.

A version is named after its run, so that publishing twice writes the same files again. `card.json` says what the
version is. It is written last: a version without it is not published.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from nightshift.config.train import TrainConfig
from nightshift.errors import (
    DocumentDamagedError,
    ModelNotFoundError,
    ObjectNotFoundError,
    ObjectTooLargeError,
    PreconditionFailedError,
)
from nightshift.ids import RunId, Sha256
from nightshift.records.keys import MODELS
from nightshift.records.parents import Parent
from nightshift.refs import ModelRef
from nightshift.storage import documents
from nightshift.storage.documents import Document, Part
from nightshift.storage.store import Store
from nightshift.values import MOST_CLASSES, ClassName, Count, ImageSize, Line, Loss, Moment, Resize, Share

_Mean = Annotated[float, Field(ge=0, le=255)]
_Deviation = Annotated[float, Field(gt=0, le=255)]

T = TypeVar("T")
_MAX_HEADER_BYTES = 4 * 1024 * 1024
"""Of a safetensors file: its first 8 bytes say how long its header is. A tensor takes 100 of it, and 2000 of memory."""


class PublishedFile(Part):
    """A file of a version: its size, and the sha256 it was published with."""

    bytes: Count
    sha256: Sha256


class ModelCard(Document):
    """What a published version is, what it was made of, and how good it is.

    Cards of format 3 say no size: their images have a side of 32 pixels. Those of format 2 hold no sha256 either, and
    those of format 1 no number.
    """

    title: ClassVar[str] = "card of a published model"
    if_damaged: ClassVar[str] = (
        "To make it again from its run's checkpoint: nightshift republish RUN, the name of its folder"
    )
    max_bytes: ClassVar[int] = 16 * documents.MIB
    sealed_since: ClassVar[int] = 3

    format: Literal[4] = 4
    name: RunId
    version: RunId
    run_id: RunId
    architecture: Line
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    image_size: ImageSize = 32
    """The side of the images it takes, in pixels."""
    resize: Resize = "stretch"
    """How an image of another shape becomes such a square."""
    input: Line
    """What the network takes, for people."""
    output: Line
    mean: tuple[_Mean, _Mean, _Mean]
    """Of each channel, on the scale 0 to 255; with `std` what an image is normalized by."""
    std: tuple[_Deviation, _Deviation, _Deviation]
    tta: Line
    test_accuracy: Share
    test_loss: Loss
    weights_sha256: Sha256
    config: dict[str, Any]
    dataset_digest: Sha256
    environment: dict[Line, Line]
    trained_at: Moment
    # Left out if None, so that a card from before this field is rebuilt with the same sha256.
    parent: Parent | None = Field(None, exclude_if=lambda parent: parent is None)
    """What its first weights came from; None: from nowhere."""
    files: dict[Line, PublishedFile] = Field(default_factory=dict)
    sha256: Sha256 | None = None
    """Over all other fields as they are stored: the history of champions knows a card by it. None before it is."""

    def check(self, key: str) -> None:
        if key != card_key(self.name, self.version):
            raise ValueError(f"it is the card of {self.name}/{self.version}, copied from elsewhere")

    def train_config(self) -> TrainConfig:
        """The config it was trained with; raises ConfigError if this nightshift cannot read it."""
        return TrainConfig.parse(self.config)

    def ref(self) -> ModelRef:
        """The version, to hand on."""
        return ModelRef(
            name=self.name,
            version=self.version,
            run_id=self.run_id,
            key=version_key(self.name, self.version),
            test_accuracy=self.test_accuracy,
            weights_sha256=self.weights_sha256,
        )


def version_key(name: str, version: str) -> str:
    """What the keys of all files of a version begin with."""
    return f"{MODELS}{name}/{version}/"


def card_key(name: str, version: str) -> str:
    return version_key(name, version) + "card.json"


def publish_version(store: Store, card: ModelCard, files: Mapping[str, bytes]) -> None:
    """Store a version's files, then its card, which lists them with size and sha256. A card that is there stays.

    Raises:
        StorageError: something could not be stored; without its card the version does not count.
    """
    for file_name, body in files.items():
        store.put(version_key(card.name, card.version) + file_name, body)
    listed = card.changed(files={file_name: described(body) for file_name, body in files.items()})
    with suppress(PreconditionFailedError):
        documents.write(store, card_key(card.name, card.version), listed, None)


def sealed(card: ModelCard, files: Mapping[str, bytes]) -> ModelCard:
    """The card of a version with these files, and its own sha256."""
    listed = card.changed(files={file_name: described(body) for file_name, body in files.items()})
    key = card_key(card.name, card.version)
    return documents.decoded(documents.encoded(listed), key, ModelCard, key)


def mend_version(store: Store, card: ModelCard, files: Mapping[str, bytes], with_card: bool = False) -> None:
    """Put files of a published version in the place of damaged ones, and then its card if that is damaged too.

    Raises:
        PreconditionFailedError: somebody else has put a card there meanwhile.
        StorageError: something could not be stored; it can be done again.
    """
    for file_name, body in files.items():
        store.put(version_key(card.name, card.version) + file_name, body)
    if with_card:
        key = card_key(card.name, card.version)
        damaged = store.head(key)
        documents.write(store, key, card, damaged.etag if damaged else None)


def read_card(store: Store, name: str, version: str, sha256: str | None = None) -> ModelCard:
    """A published version's card.

    Args:
        sha256: what `ModelCard.sha256` was when the version went live, if that is known.

    Raises:
        ModelNotFoundError: no such version is published.
        DocumentDamagedError: it is no card, or not the one that went live.
        StorageError: the card cannot be read, or is of a newer nightshift.
    """
    key = card_key(name, version)
    try:
        card, _ = documents.read(store, key, ModelCard)
    except ObjectNotFoundError:
        raise ModelNotFoundError(
            f"no version {version!r} of {name} is published in {store.url(MODELS)}. A version is named after its run, "
            "and published when that is finished: `nightshift runs` lists them"
        ) from None
    if sha256 not in (None, card.sha256):
        raise DocumentDamagedError(
            f"{store.url(key)} was changed after {version} went live: its sha256 is {card.sha256}, and was {sha256}. "
            f"To make it again as it was: nightshift republish {version}. To believe it as it is now: "
            f"nightshift promote {version}"
        )
    return card


def read_file(store: Store, card: ModelCard, file_name: str) -> bytes:
    """One file of a version, after its sha256 was found right.

    Raises:
        DocumentDamagedError: it is missing, or not what was published.
        StorageError: it cannot be read.
    """
    key, listed = version_key(card.name, card.version) + file_name, card.files.get(file_name)
    problem = "not what was published: its sha256 is not the one in card.json"
    for _ in range(2):  # it may only have been damaged on the way
        try:
            body = store.download_bytes(key, max_bytes=listed.bytes if listed else 0)
        except ObjectNotFoundError:
            problem = "missing"
        except ObjectTooLargeError:
            continue
        else:
            if listed == described(body):
                return body
    raise DocumentDamagedError(
        f"{store.url(key)} is {problem}. To make it again from the run's checkpoint: nightshift republish {card.run_id}"
    )


def read_tensors(store: Store, card: ModelCard, file_name: str, load: Callable[[bytes], T]) -> T:
    """What `load` makes of a safetensors file of a version, after its sha256 was found right; what it raises is damage.

    Raises:
        DocumentDamagedError: it is not what was published, or is none of which `load` makes something.
        StorageError: it cannot be read.
    """
    body = read_file(store, card, file_name)
    try:
        return load_bounded(body, load)
    except Exception as error:  # whoever can write to the bucket can write the sha256 of anything
        url = store.url(version_key(card.name, card.version) + file_name)
        raise DocumentDamagedError(f"{url} is damaged: {error}. Train and publish under another run id") from error


def load_bounded(body: bytes, load: Callable[[bytes], T]) -> T:
    """What `load` makes of a safetensors file whose header is no longer than one can be; else ValueError."""
    if int.from_bytes(body[:8], "little") > _MAX_HEADER_BYTES:
        raise ValueError("its header is too long")
    return load(body)


def described(body: bytes) -> PublishedFile:
    """A file as a card lists it."""
    return PublishedFile(bytes=len(body), sha256=hashlib.sha256(body).hexdigest())

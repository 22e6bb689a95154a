"""Published versions of a model: immutable files under `models/<name>/<version>/`.

A version is named after its run, so that publishing twice writes the same files again. `card.json` says what the
version is. It is written last: a version without it is not published.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, Literal

from pydantic import AwareDatetime, Field

from nightshift.config.train import TrainConfig
from nightshift.errors import ModelNotFoundError, ObjectNotFoundError, PreconditionFailedError, StorageError
from nightshift.ids import RunId, Sha256
from nightshift.records.keys import MODELS
from nightshift.refs import ModelRef
from nightshift.storage import documents
from nightshift.storage.documents import Document, Part
from nightshift.storage.store import Store


class PublishedFile(Part):
    """A file of a version: its size, and the sha256 it was published with."""

    bytes: int
    sha256: Sha256


class ModelCard(Document):
    """What a published version is, what it was made of, and how good it is. Cards of format 1 hold no number."""

    title: ClassVar[str] = "card of a published model"
    if_damaged: ClassVar[str] = (
        "Bring an older version of the object back if the bucket keeps them, or train and publish under another run id"
    )
    is_sealed: ClassVar[bool] = False
    """Others read cards too, and may add to them."""

    format: Literal[2] = 2
    name: str
    version: str
    run_id: RunId
    architecture: str
    classes: tuple[str, ...]
    input: str
    """What the network takes, for people."""
    output: str
    mean: tuple[float, ...]
    """Of each channel, on the scale 0 to 255; with `std` what an image is normalized by."""
    std: tuple[float, ...]
    tta: str
    test_accuracy: float
    test_loss: float
    weights_sha256: Sha256
    config: dict[str, Any]
    dataset_digest: Sha256
    environment: dict[str, str]
    trained_at: AwareDatetime
    files: dict[str, PublishedFile] = Field(default_factory=dict)

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
    listed = card.changed(files={file_name: _described(body) for file_name, body in files.items()})
    with suppress(PreconditionFailedError):
        documents.write(store, card_key(card.name, card.version), listed, None)


def read_card(store: Store, name: str, version: str) -> ModelCard:
    """A published version's card.

    Raises:
        ModelNotFoundError: no such version is published.
        StorageError: the card cannot be read, is damaged, or is of a newer nightshift.
    """
    try:
        return documents.read(store, card_key(name, version), ModelCard)[0]
    except ObjectNotFoundError:
        raise ModelNotFoundError(
            f"no version {version!r} of {name} is published in {store.url(MODELS)}. A version is named after its run, "
            "and published when that is finished: `nightshift runs` lists them"
        ) from None


def read_file(store: Store, card: ModelCard, file_name: str) -> bytes:
    """One file of a version, after its sha256 was found right.

    Raises:
        StorageError: it cannot be read, or is not what was published.
    """
    key = version_key(card.name, card.version) + file_name
    body = store.download_bytes(key)
    if card.files.get(file_name) != _described(body):
        raise StorageError(f"{store.url(key)} is not what was published: its sha256 is not the one in card.json")
    return body


def _described(body: bytes) -> PublishedFile:
    return PublishedFile(bytes=len(body), sha256=hashlib.sha256(body).hexdigest())

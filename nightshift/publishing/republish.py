"""Making a published version again, of which something was damaged or deleted: to the same sha256, or not at all."""

import itertools
from collections.abc import Mapping

from nightshift.data.datasets import open_dataset
from nightshift.errors import (
    ConfigError,
    DocumentDamagedError,
    ExportError,
    ModelNotFoundError,
    ObjectNotFoundError,
    ObjectTooLargeError,
    StorageDeniedError,
    StorageError,
    StorageUnreachableError,
)
from nightshift.hardware import failures_explained, find_device
from nightshift.judging import evaluation
from nightshift.publishing.publish import Measured, contents_of, weights_of
from nightshift.records.history import read_copy, read_history
from nightshift.records.run import RunRecord
from nightshift.records.versions import (
    ModelCard,
    PublishedFile,
    described,
    mend_version,
    read_card,
    read_file,
    sealed,
    version_key,
)
from nightshift.storage.documents import MIB
from nightshift.storage.store import Store
from nightshift.workspace import Workspace

_CARD = "card.json"


def republish(workspace: Workspace, record: RunRecord) -> list[str]:
    """Make again what is damaged or missing of the version that a run has published; what is whole stays.

    Everything is made from the run's kept checkpoint, its record and the data set, as it was when the run was
    published. So it has the same sha256 where the environment is the same. If a version went live, its card must be
    the one with which it did.

    Returns:
        The names of the files that were made again, the card's last; empty if all are whole.

    Raises:
        ConfigError: the run is not finished, so nothing of it is published.
        ExportError: something does not come out as it was published. If it is the card, nothing was made again, else
            all other damaged files were.
        CheckpointCorruptError, DataUnavailableError: what it is made from is gone.
        StorageError: something cannot be read or stored.
    """
    if not record.result:
        raise ConfigError(
            f"run {record.run_id} is not finished, so there is no version of it to make again. To finish it: "
            f"nightshift resume {record.run_id}"
        )
    store, name, version = workspace.store, record.dataset.name, record.run_id
    history = read_history(store, name)
    went_live_as = (history if history.transitions else read_copy(store, name)).card_sha256(version)
    card = _whole_card(store, record, went_live_as)
    damaged = _damaged(store, card) if card else []
    if card and not damaged:
        return []
    made, files = _make(workspace, record)
    if card:
        again = {file: files[file] for file in damaged if card.files[file] == _described(files, file)}
        mend_version(store, card, again)
        if len(again) < len(damaged):
            raise _comes_out_otherwise(record, [file for file in damaged if file not in again])
        return damaged
    files = _as_it_went_live(store, record, made, files, went_live_as)
    again = {file_name: body for file_name, body in files.items() if _stored(store, made, file_name, body) != body}
    mend_version(store, sealed(made, files), again, with_card=True)
    return [*again, _CARD]


def _whole_card(store: Store, record: RunRecord, sha256: str | None) -> ModelCard | None:
    try:
        card = read_card(store, record.dataset.name, record.run_id, sha256)
    except (ModelNotFoundError, DocumentDamagedError):
        return None
    assert record.result
    return card if card.weights_sha256 == record.result.weights_sha256 else None


def _damaged(store: Store, card: ModelCard) -> list[str]:
    damaged = []
    for file_name in card.files:
        try:
            read_file(store, card, file_name)
        except (StorageUnreachableError, StorageDeniedError):
            raise
        except StorageError:  # some stores answer 500 for ever where a bit has flipped
            damaged.append(file_name)
    return damaged


def _make(workspace: Workspace, record: RunRecord) -> tuple[ModelCard, dict[str, bytes]]:
    """Card and files as they were published, if the environment is the same."""
    assert record.result
    dataset = open_dataset(workspace, record.dataset)
    weights = weights_of(workspace.store, record)
    result = record.result
    measured = Measured(result.test_accuracy, result.test_loss, result.weights_sha256)
    predictions = _predictions(workspace.store, record)
    if predictions is None:
        config = record.train_config()
        device = find_device(config.hardware.device)
        with failures_explained(device):
            model = evaluation.load_model(config, weights, len(dataset.classes), device, dataset.image_size)
            answers = evaluation.answer_test_images(model, dataset, config)
        predictions = evaluation.predictions_file(answers, dataset)
    return contents_of(record, weights, measured, predictions, dataset)


def _predictions(store: Store, record: RunRecord) -> bytes | None:
    """Those that the run's evaluation has stored, if they are whole and of these weights."""
    metrics = evaluation.read_metrics(store, record.run_id)
    if not metrics or not record.result or metrics.weights_sha256 != record.result.weights_sha256:
        return None
    try:
        return evaluation.read_predictions(store, metrics)
    except (StorageUnreachableError, StorageDeniedError):
        raise
    except StorageError:
        return None


def _as_it_went_live(
    store: Store, record: RunRecord, card: ModelCard, files: dict[str, bytes], sha256: str | None
) -> dict[str, bytes]:
    """The files that give the card this sha256: each either as made now, or as still stored."""
    if sha256 is None:
        return files
    choices = [
        [body, lying] if (lying := _stored(store, card, file_name, body)) not in (None, body) else [body]
        for file_name, body in files.items()
    ]
    for chosen in itertools.product(*choices):
        found = dict(zip(files, chosen, strict=True))
        if sealed(card, found).sha256 == sha256:
            return found
    raise _comes_out_otherwise(record, [_CARD])


def _stored(store: Store, card: ModelCard, file_name: str, like: bytes) -> bytes | None:
    """What lies in the place of a file now, if it can be read and is not far larger than the one made again."""
    try:
        return store.download_bytes(version_key(card.name, card.version) + file_name, max_bytes=2 * len(like) + MIB)
    except (ObjectNotFoundError, ObjectTooLargeError):
        return None


def _described(files: Mapping[str, bytes], file_name: str) -> PublishedFile | None:
    return described(files[file_name]) if file_name in files else None


def _comes_out_otherwise(record: RunRecord, names: list[str]) -> ExportError:
    then = ", ".join(f"{name}={value}" for name, value in record.environment.items())
    return ExportError(
        f"{', '.join(names)} of {record.run_id} does not come out as it was published, and was left as it is. The "
        f"run was made with {then}: type the command in that environment, or bring "
        "an older version of the object back if the bucket keeps them, or train and publish under another run id"
    )

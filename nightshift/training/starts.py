"""How a run begins: with the weights of a parent, which is written into its record before the first step.

The weights are read from the store alone, by their sha256. So a run that is started again before its first checkpoint
begins with the same ones, without the file or the hub they came from, and whatever champion went live meanwhile.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from nightshift import progress
from nightshift.checkpoints.weights import PUBLISHED_WEIGHTS, importable, published_weights, read_weights, written
from nightshift.config.train import TrainConfig
from nightshift.data.datasets import Dataset
from nightshift.errors import (
    ConfigError,
    DataCorruptError,
    DataUnavailableError,
    ModelNotFoundError,
    ObjectNotFoundError,
    ObjectTooLargeError,
    RunNotFoundError,
)
from nightshift.networks import build_network, head_of, pretrained_weights
from nightshift.plugins import project_folder
from nightshift.records.champions import champion_of, read_card_of
from nightshift.records.history import read_history
from nightshift.records.keys import weights_key
from nightshift.records.parents import Parent, is_control, known_sha256
from nightshift.records.run import newest_records, read_record
from nightshift.records.versions import read_card
from nightshift.storage.documents import MIB
from nightshift.storage.store import Store
from nightshift.text import plain

_MAX_BYTES = 4096 * MIB
_SHOWN = 3
"""So many names are shown of those that do not fit."""


def parent_of(store: Store, run_id: str, config: TrainConfig, dataset: Dataset) -> Parent | None:
    """What a run's first weights come from: as its record says, else as they are found now, stored, and seen to fit.

    None where the config says scratch.

    Raises:
        ConfigError: there are no such weights, or they do not fit the network. Nothing was recorded.
        DataUnavailableError: the library cannot download them.
        StorageError: the champion cannot be read, or the weights cannot be stored.
    """
    if config.start.name == "scratch":
        return None
    with suppress(RunNotFoundError):
        return read_record(store, run_id)[0].parent
    every = config.start.scratch_every
    if every and is_control(newest_records(store), dataset.name, every):
        return Parent(kind="scratch", detail=f"one night in {every} does, to compare with")
    parent = _pretrained(store, config) if config.start.name == "pretrained" else _champion(store, config, dataset.name)
    if parent.kind == "scratch":
        return parent
    with torch.random.fork_rng(devices=[]):
        network = build_network(config.model.name, len(dataset.classes), dataset.image_size)
    return parent.changed(detail=plain(begin(store, parent, config, dataset, network))[:1000])


def begin(store: Store, parent: Parent, config: TrainConfig, dataset: Dataset, network: nn.Module) -> str:
    """Give a freshly made network the weights of its parent. Returns what was made anew or left out, in a line.

    The champion's classes are matched by name. A new class keeps its random weights. Where the champion's weights are
    shrunk and perturbed, the perturbation is a share of the random weights, layer by layer as large as those are (Ash
    and Adams 2020, arXiv 1910.08475).

    Raises:
        ConfigError: they do not fit.
        DataUnavailableError, DataCorruptError: they are gone, or not what the record says.
        DocumentDamagedError, StorageError: so it is for those of a champion.
    """
    head = head_of(config.model.name, len(dataset.classes), dataset.image_size)
    if parent.kind == "pretrained":
        weights = _renamed(_kept(store, parent), config.start.names, network)
        return _take(network, weights, head, None, f"the weights {parent.source}")
    card = read_card(store, dataset.name, parent.source, parent.card_sha256)
    weights = published_weights(store, card)
    fresh = {name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad}
    rows = [card.classes.index(name) if name in card.classes else -1 for name in dataset.classes]
    told = _take(network, weights, head, rows, f"the champion {card.version}")
    if parent.kind == "shrink":
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name in fresh:
                    value.mul_(config.start.shrink).add_(fresh[name], alpha=config.start.perturb)
    new = [name for name, row in zip(dataset.classes, rows, strict=True) if row < 0]
    return "; ".join(filter(None, (told, f"new classes: {_some(new)}" if new else "")))


def _champion(store: Store, config: TrainConfig, name: str) -> Parent:
    history = read_history(store, name)
    try:
        champion = champion_of(store, history)
    except ModelNotFoundError:
        return Parent(kind="scratch", detail=f"{name} has no champion yet")
    card = read_card_of(store, history, champion.version)
    if card.architecture != config.model.name:
        raise ConfigError(
            f"start={config.start.name}: the champion {card.version} is a {card.architecture}, and its weights are of "
            f"no use to a {config.model.name}. Set start=scratch until one of these is champion"
        )
    file = card.files.get(PUBLISHED_WEIGHTS)
    if not file:
        raise ConfigError(
            f"start={config.start.name}: the card of the champion {card.version} names no {PUBLISHED_WEIGHTS}"
        )
    return Parent(
        kind="champion" if config.start.name == "champion" else "shrink",
        source=card.version,
        sha256=file.sha256,
        bytes=file.bytes,
        card_sha256=card.sha256,
    )


def _pretrained(store: Store, config: TrainConfig) -> Parent:
    """The weights that the config names, once they are in the store. Where their place is gone, an earlier night's."""
    place = config.start.weights or ""
    source = plain(place if place != "hub" else f"hub {config.model.name}")[:1000]
    body = None if place == "hub" else _found(store, place)
    if body is None:
        known = known_sha256(newest_records(store), source)
        if known and known.sha256 and store.head(weights_key(known.sha256)):
            return known
        if place != "hub":
            raise ConfigError(f"start.weights={place!r}: there is no such file here, and no run has begun with one")
        body = written(pretrained_weights(config.model.name))
    try:
        body = importable(body)
    except ConfigError as error:
        raise ConfigError(f"start.weights={place!r} {error}") from None
    parent = Parent(kind="pretrained", source=source, sha256=hashlib.sha256(body).hexdigest(), bytes=len(body))
    # Also where they are there already, lest gc finds them old before this run's record names them.
    with progress.current().transfer(f"storing {source}", len(body)) as advance:
        store.upload(weights_key(parent.sha256 or ""), io.BytesIO(body), advance)
    return parent


def _found(store: Store, place: str) -> bytes | None:
    """The bytes of a file, relative to the project file's folder or to the working directory, or of an object.

    None if there is none.
    """
    try:
        if place.startswith("s3://"):
            elsewhere, key = store.at(place)
            return elsewhere.download_bytes(key, _MAX_BYTES)
        # A worker is rarely in the folder of the project file, and a person mostly is.
        path = Path(place).expanduser()
        if (beside := project_folder() / path).exists():
            path = beside
        if path.stat().st_size > _MAX_BYTES:
            raise ObjectTooLargeError(f"it has {path.stat().st_size:,} bytes, and at most {_MAX_BYTES:,} are read")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ObjectNotFoundError):
        return None
    except (OSError, ObjectTooLargeError) as error:
        raise ConfigError(f"start.weights={place!r} cannot be read: {error}") from None


def _kept(store: Store, parent: Parent) -> dict[str, Tensor]:
    key = weights_key(parent.sha256 or "")
    try:
        body = store.download_bytes(key, max_bytes=parent.bytes)
    except (ObjectNotFoundError, ObjectTooLargeError) as error:
        raise DataUnavailableError(
            f"{store.url(key)}, with which the run begins ({parent.source}), is not there as it was stored: {error}. "
            "Start under another run id"
        ) from None
    if hashlib.sha256(body).hexdigest() != parent.sha256:
        raise DataCorruptError(f"{store.url(key)} is damaged: it does not have the sha256 that it is named by")
    try:
        return read_weights(body)
    except Exception as error:  # whoever can write to the bucket can name anything by its sha256
        raise DataCorruptError(f"{store.url(key)} holds no weights: {error}") from error


def _renamed(weights: dict[str, Tensor], names: str, network: nn.Module) -> dict[str, Tensor]:
    """The weights under the names that the network has for them."""
    if names == "same":
        return weights
    if names == "order":
        expected = list(network.state_dict())
        if len(expected) != len(weights):
            raise ConfigError(
                f"start.names=order: the file has {len(weights)} tensors, and the network has {len(expected)}"
            )
        return dict(zip(expected, weights.values(), strict=True))
    pairs = [pair.split("=") for pair in names.split(",")]

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)

    return {renamed(name): tensor for name, tensor in weights.items()}


def _take(
    network: nn.Module, weights: Mapping[str, Tensor], head: Mapping[str, int], rows: Sequence[int] | None, whose: str
) -> str:
    """Copy weights into a network, all or nothing. Returns what was made anew or left out.

    Args:
        head: the tensors whose size in a dimension is the number of classes, and which dimension that is.
        rows: for the head, the class of the weights that each class of the network matches, or -1. None: not known,
            and a head of another size is left as it is.
    """
    expected = network.state_dict()
    copies: list[tuple[Tensor, Tensor]] = []
    wrong, anew = [], []
    for name, into in expected.items():
        found = weights.get(name)
        if found is None:
            if not name.endswith("num_batches_tracked"):
                anew.append(name)
        elif name in head and found.ndim == into.ndim and (rows is not None or found.shape != into.shape):
            if _without(found.shape, head[name]) != _without(into.shape, head[name]):
                wrong.append(f"{name} {tuple(found.shape)}, not {tuple(into.shape)}")
            elif rows is None:
                anew.append(name)
            else:
                size = found.shape[head[name]]
                kept = [(new, old) for new, old in enumerate(rows) if 0 <= old < size]
                copies += [(into.select(head[name], new), found.select(head[name], old)) for new, old in kept]
        elif found.shape != into.shape:
            wrong.append(f"{name} {tuple(found.shape)}, not {tuple(into.shape)}")
        else:
            copies.append((into, found))
    if not copies and not wrong:
        raise ConfigError(
            f"{whose}: none of their names is one of the network's. Theirs are {_some(list(weights))}, the network's "
            f"{_some(list(expected))}. Set start.names"
        )
    if wrong or (rows is not None and anew):
        what = f"have {_some(wrong)}" if wrong else f"lack {_some(anew)}"
        raise ConfigError(f"{whose} do not fit the network: they {what}")
    with torch.no_grad():
        for into, found in copies:
            into.copy_(found)
    left = [name for name in weights if name not in expected]
    said = (f"made anew: {_some(anew)}" if anew else "", f"left out: {_some(left)}" if left else "")
    return "; ".join(filter(None, said))


def _without(shape: torch.Size, dimension: int) -> tuple[int, ...]:
    return (*shape[:dimension], *shape[dimension + 1 :])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name:.100}" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"

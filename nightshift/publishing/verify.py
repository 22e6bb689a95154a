"""Reading published versions back: the histories of champions, the cards, and each file against its sha256."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from nightshift.errors import ModelNotFoundError, StorageDeniedError, StorageError, StorageUnreachableError
from nightshift.records import champions, serving
from nightshift.records.history import History, history_key, read_copy, read_history
from nightshift.records.keys import MODELS, place_of
from nightshift.records.run import newest_records
from nightshift.records.versions import card_key, read_card, read_file, version_key
from nightshift.storage.store import Store


@dataclass(frozen=True)
class Checked:
    """An object that was read back, and what is wrong with it."""

    key: str
    problem: str | None


def verify_published(store: Store, run_id: str | None = None) -> Iterator[Checked]:
    """Read back what is published, or only the version of one run, and say which objects are bad.

    A version counts as published if it has a card, if its run is finished, or if it ever went live.

    Raises:
        ModelNotFoundError: nothing is published, or no version of this run.
        StorageUnreachableError, StorageDeniedError: the store does not answer.
    """
    published = _published(store)
    wanted = {name: sorted(versions & {run_id} if run_id else versions) for name, versions in published.items()}
    if not any(wanted.values()):
        raise ModelNotFoundError(
            f"no version {'of ' + run_id if run_id else 'at all'} is published in {store.url(MODELS)}. A version is "
            "named after its run, and published when that is finished: `nightshift runs` lists them"
        )
    for name, versions in sorted(wanted.items()):
        if versions and not run_id:
            state = champions.state_of(store, name)
            yield Checked(history_key(name), None if state.ok else state.detail)
            yield from _verify_served(store, name)
        for version in versions:
            yield from _verify_version(store, _history(store, name), version)


def _verify_served(store: Store, name: str) -> Iterator[Checked]:
    """What a Triton server gets, if there is anything for it."""
    try:
        if number := serving.served(store, name):
            yield Checked(serving.model_key(name, number), serving.problem(store, name))
    except (StorageUnreachableError, StorageDeniedError):
        raise
    except StorageError as error:
        yield Checked(serving.config_key(name), str(error))


def _published(store: Store) -> dict[str, set[str]]:
    """The published versions of each model."""
    found: dict[str, set[str]] = defaultdict(set)
    for item in store.list(MODELS):
        place = place_of(item.key)
        name = item.key.split("/")[1]
        if place and place.kind == "champion":
            found[name].update(_history(store, name).versions)
        elif place and item.key.endswith("/card.json"):
            found[name].add(place.run_id)
    for record in newest_records(store):
        name, version = record.dataset.name, record.run_id
        if record.result and record.result.model == version_key(name, version) and place_of(card_key(name, version)):
            found[name].add(version)
    return found


def _history(store: Store, name: str) -> History:
    """The history, or its copy; an empty one if neither can be read, which `verify_published` says."""
    for read in (read_history, read_copy):
        try:
            if (history := read(store, name)).transitions:
                return history
        except (StorageUnreachableError, StorageDeniedError):
            raise
        except StorageError:
            continue
    return History(name=name)


def _verify_version(store: Store, history: History, version: str) -> Iterator[Checked]:
    key = card_key(history.name, version)
    try:
        card = read_card(store, history.name, version, history.card_sha256(version))
    except (StorageUnreachableError, StorageDeniedError):
        raise
    except ModelNotFoundError:
        yield Checked(key, f"it is missing. To make it again: nightshift republish {version}")
        return
    except StorageError as error:
        yield Checked(key, str(error))
        return
    yield Checked(key, None)
    for file_name in card.files:
        try:
            read_file(store, card, file_name)
        except (StorageUnreachableError, StorageDeniedError):
            raise
        except StorageError as error:
            yield Checked(version_key(history.name, version) + file_name, str(error))
        else:
            yield Checked(version_key(history.name, version) + file_name, None)

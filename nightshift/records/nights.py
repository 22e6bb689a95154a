"""What the last nights have left in the store."""

from collections import defaultdict
from itertools import islice

from nightshift.records.keys import PAYLOADS, REPORTS, record_key
from nightshift.records.run import RunRecord, newest_records
from nightshift.storage.store import Store

_NIGHTS = 5
_BY_HAND = "train-cifar/adhoc"
_LOOKED_AT = 200
"""So many records are looked at in search of nights."""


def sizes(store: Store) -> list[int]:
    """How many bytes each of the last five nights has left, with the runs of all its deployments.

    If no finished night is among the newest runs, each of the last five is one.

    Raises:
        StorageError: the store cannot be listed.
    """
    finished = [record for record in islice(newest_records(store), _LOOKED_AT) if record.status == "finished"]
    nights = defaultdict[object, list[RunRecord]](list)
    for record in finished:
        if record.origin.deployment and record.origin.deployment != _BY_HAND:
            nights[record.created_at.date()].append(record)
    newest = list(nights.values()) or [[record] for record in finished]
    return [sum(_size(store, record) for record in night) for night in newest[:_NIGHTS]]


def _size(store: Store, record: RunRecord) -> int:
    run_id = record.run_id
    places = [record_key(run_id), f"{PAYLOADS}{run_id}/", f"{REPORTS}{run_id}/"]
    if record.result:
        places.append(f"{record.result.model.rstrip('/')}/")
    return sum(item.size for place in places for item in store.list(place))

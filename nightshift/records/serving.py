"""The champions as a model repository for Triton, `triton/<name>/`: config.pbtxt, and model.onnx below a number.

config.pbtxt names the one number that is served. It is written last, so one put changes what is live, and the model it
names is already there. Each time a version goes live it gets a new number, that of its transition in the history. So a
number always means the same model, and a rollback is a change like any other.
"""

import re
from collections.abc import Iterable

from nightshift import progress
from nightshift.errors import DocumentDamagedError, ObjectNotFoundError
from nightshift.records.champions import read_card_of
from nightshift.records.history import History, read_history
from nightshift.records.keys import SERVED
from nightshift.records.versions import ModelCard, described, read_file
from nightshift.storage.store import Store, Stored

FOR_TRITON = "triton.onnx"
"""What a version has that was published for Triton."""
_MOST_IMAGES = 64
"""In a batch that Triton makes of several requests."""
_OURS = "# Written by nightshift, which writes it anew whenever another version goes live.\n"
_CONFIG = """\
name: "{card.name}"
backend: "onnxruntime"
max_batch_size: {most}
input [ {{ name: "images" data_type: TYPE_FP32 dims: [ 3, {card.image_size}, {card.image_size} ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ {classes} ] }} ]
version_policy: {{ specific {{ versions: [ {number} ] }} }}
dynamic_batching {{ }}
parameters {{ key: "nightshift.version" value {{ string_value: "{card.version}" }} }}
parameters {{ key: "nightshift.weights_sha256" value {{ string_value: "{card.weights_sha256}" }} }}
"""
_NUMBER = re.compile(r"^version_policy: \{ specific \{ versions: \[ ([1-9][0-9]{0,8}) \] \} \}$", re.MULTILINE)
_MAX_BYTES = 64 * 1024


def config_key(name: str) -> str:
    return f"{SERVED}{name}/config.pbtxt"


def model_key(name: str, number: int) -> str:
    return f"{SERVED}{name}/{number}/model.onnx"


def serve(store: Store, name: str, anew: bool = False) -> None:
    """Let the repository serve the champion, if that was published for it; otherwise it goes on with what it serves.

    Args:
        anew: write what is served once more even if it seems to be there.

    Raises:
        DocumentDamagedError: the champion's card or model.onnx is not what was published.
        StorageError: something cannot be read or written; it can be done again.
    """
    done = 0
    # If another version goes live meanwhile, it may be written before ours is: so ours looks once more.
    while (history := read_history(store, name)).champion and len(history.transitions) != done:
        _serve(store, history, anew)
        done = len(history.transitions)


def served(store: Store, name: str) -> int | None:
    """The number that config.pbtxt names; None if there is none of nightshift's.

    Raises:
        DocumentDamagedError: it names none.
        StorageError: it cannot be read.
    """
    config = _config(store, name)
    if config is None or not config.startswith(_OURS):
        return None
    found = _NUMBER.search(config)
    if not found:
        raise DocumentDamagedError(
            f"{store.url(config_key(name))} is damaged: `nightshift promote` of the champion writes it anew"
        )
    return int(found[1])


def problem(store: Store, name: str) -> str | None:
    """What is wrong with what the repository serves; None if it is the champion, as it was published.

    Raises:
        DocumentDamagedError: the champion's card is not what was published.
        StorageError: something cannot be read.
    """
    history = read_history(store, name)
    assert history.champion
    card, number = read_card_of(store, history, history.champion.version), len(history.transitions)
    again = f"To write it anew: nightshift promote {card.version} --name {name}"
    if FOR_TRITON not in card.files:
        return f"the champion {card.version} has no {FOR_TRITON}, so an earlier version is served"
    if _config(store, name) != _text(card, number):
        return f"Triton does not serve the champion {card.version}. {again}"
    try:
        body = store.download_bytes(model_key(name, number), max_bytes=card.files[FOR_TRITON].bytes)
    except ObjectNotFoundError:
        body = b""
    return None if described(body) == card.files[FOR_TRITON] else f"it is not what was published. {again}"


def replaced(store: Store, items: Iterable[Stored]) -> list[Stored]:
    """Those of these objects of repositories that are older than what is served."""
    found, serves = [], dict[str, int | None]()
    for item in items:
        _, name, number, *_ = item.key.split("/")
        if not number.isdecimal():
            continue
        if name not in serves:
            try:
                serves[name] = served(store, name)
            except DocumentDamagedError as error:
                progress.current().warn(f"what was served of {name} is left alone: {error}")
                serves[name] = None
        if int(number) < (serves[name] or 0):
            found.append(item)
    return found


def _serve(store: Store, history: History, anew: bool) -> None:
    assert history.champion
    name, number = history.name, len(history.transitions)
    card = read_card_of(store, history, history.champion.version)
    if FOR_TRITON not in card.files:
        if store.head(config_key(name)):
            progress.current().warn(
                f"{card.version} is live, but Triton goes on with the version before it, as this one was trained "
                f"without publish.triton=true and has no {FOR_TRITON}"
            )
        return
    config = _config(store, name)
    if config is not None and not config.startswith(_OURS):
        progress.current().warn(
            f"{store.url(config_key(name))} is somebody else's and is left alone, so Triton is not told that "
            f"{card.version} is live: set NIGHTSHIFT_S3__PREFIX, or take it away"
        )
        return
    there, text = store.head(model_key(name, number)), _text(card, number)
    is_there = there and there.size == card.files[FOR_TRITON].bytes
    if anew or not is_there or config != text:
        store.put(model_key(name, number), read_file(store, card, FOR_TRITON))
        store.put(config_key(name), text.encode())


def _text(card: ModelCard, number: int) -> str:
    return _OURS + _CONFIG.format(card=card, number=number, classes=len(card.classes), most=_MOST_IMAGES)


def _config(store: Store, name: str) -> str | None:
    try:
        return store.get(config_key(name), _MAX_BYTES)[0].decode(errors="replace")
    except ObjectNotFoundError:
        return None

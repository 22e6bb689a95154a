"""A payload that is uploaded while it is serialized: the same bytes, or an error, and nobody left waiting."""

import hashlib
import io
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO

import pytest
import torch

from nightshift.checkpoints import upload
from nightshift.checkpoints.payload import Payload
from nightshift.checkpoints.upload import upload_payload
from nightshift.errors import StorageError
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store

SMALL: Payload = {"step": 3, "model": {"weight": torch.arange(12.0).reshape(3, 4), "none": torch.empty(0)}}
LARGE: Payload = {"model": {str(n): torch.full((300_001,), n, dtype=torch.bfloat16) for n in range(9)}, "step": 4}


@pytest.mark.parametrize("payload", [SMALL, LARGE, {}], ids=["small", "large", "empty"])
def test_the_stored_bytes_are_those_that_torch_writes(payload: Payload) -> None:
    store, file = MemoryStore(), io.BytesIO()
    torch.save(payload, file, pickle_protocol=2)
    written = upload_payload(store, "key", payload)
    assert store.get("key")[0] == file.getvalue()
    assert (written.bytes, written.sha256) == (len(file.getvalue()), hashlib.sha256(file.getvalue()).hexdigest())


@pytest.mark.parametrize("read", [0, 1, 3_000_000])
def test_a_store_that_fails_after_so_many_bytes_leaves_no_thread_behind(read: int) -> None:
    class Failing(MemoryStore):
        def upload(self, key: str, body: IO[bytes], advance: Callable[[int], object] | None = None) -> None:
            assert len(body.read(read)) == read
            raise StorageError("503 Slow Down")

    with pytest.raises(StorageError, match="503"):
        upload_payload(Failing(), "key", LARGE)
    for thread in threading.enumerate():
        if thread.name == "payload":
            thread.join(60)
            assert not thread.is_alive()


def test_what_cannot_be_serialized_is_an_error_and_nothing_is_stored() -> None:
    store = MemoryStore()
    with pytest.raises(AttributeError, match="lambda"):
        upload_payload(store, "key", {**LARGE, "step": lambda: 1})
    assert not [*store.list("")]


def test_an_upload_whose_payload_ends_too_early_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, written = {"weight": torch.zeros(10_000_000)}, upload.upload_payload(store, "key", SMALL)
    offered = upload._Stream.offer

    def offer(stream: upload._Stream, content: bytes | memoryview) -> None:
        if len(content) > 1_000_000:
            offered(stream, content[:30_000_000])
            raise MemoryError
        offered(stream, content)

    monkeypatch.setattr(upload._Stream, "offer", offer)
    with pytest.raises(RuntimeError, match="unexpected pos"):  # what torch makes of it
        upload_payload(store, "key", whole)
    assert hashlib.sha256(store.get("key")[0]).hexdigest() == written.sha256
    assert not [*store.list_uploads("")]


ENDS_IN_AN_UPLOAD = """
import sys, threading
import torch
from nightshift.checkpoints.upload import upload_payload
from nightshift.storage.memory import MemoryStore

class Failing(MemoryStore):
    def upload(self, key, body, advance=None):
        body.read(1)
        begun.set()
        ended.wait()
        raise OSError("the process is about to end")

begun, ended = threading.Event(), threading.Event()
payload = {"weight": torch.zeros(50_000_000)}
threading.Thread(target=upload_payload, args=(Failing(), "key", payload), daemon=True).start()
begun.wait()
threading._register_atexit(ended.set)
sys.exit(3)
"""


@pytest.mark.slow
def test_a_process_that_ends_in_an_upload_has_its_own_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS_IN_AN_UPLOAD], capture_output=True, text=True)
    assert (done.returncode, "terminate called" in done.stderr) == (3, False), done.stderr

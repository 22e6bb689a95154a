"""Payloads of any content: they are found damaged, never believed, and run nothing."""

import hashlib
import io
import zipfile
from contextlib import suppress

import torch
from hypothesis import given
from hypothesis import strategies as st

from nightshift.checkpoints.payload import read_payload
from nightshift.errors import CheckpointCorruptError
from nightshift.refs import CheckpointRef
from nightshift.storage.memory import MemoryStore
from nightshift.training.state import TrainState
from tests.fuzz import mutations
from tests.fuzz.conftest import FUZZ

KEY = "checkpoints/run/20-1.pt"


def _payload() -> bytes:
    network = torch.nn.Linear(4, 2)
    state = TrainState(network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), torch.device("cpu"))
    network(torch.ones(1, 4)).sum().backward()
    state.optimizer.step()
    state.step = 20
    buffer = io.BytesIO()
    torch.save(state.capture(), buffer)
    return buffer.getvalue()


WHOLE = _payload()
with zipfile.ZipFile(io.BytesIO(WHOLE)) as archive:
    ENTRIES = {entry.filename: archive.read(entry) for entry in archive.infolist()}
PICKLE = next(name for name in ENTRIES if name.endswith("data.pkl"))


def zipped(entries: dict[str, bytes], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, body in entries.items():
            archive.writestr(name, body)
    return buffer.getvalue()


def _with_entry(name: str) -> st.SearchStrategy[bytes]:
    compression = st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    return st.builds(
        lambda body, how: zipped({**ENTRIES, name: body}, how), mutations.bytes_of(ENTRIES[name]), compression
    )


@FUZZ
@given(
    body=st.one_of(
        mutations.bytes_of(WHOLE), _with_entry(PICKLE), st.sampled_from(sorted(ENTRIES)).flatmap(_with_entry)
    )
)
def test_a_payload_of_any_content_is_read_or_found_damaged(body: bytes) -> None:
    """Also where the record has the right sha256 for it: whoever can write to the bucket can write both."""
    store = MemoryStore()
    store.put(KEY, body)
    sha256 = hashlib.sha256(body).hexdigest()
    checkpoint = CheckpointRef(run_id="run", step=20, epoch=1, key=KEY, bytes=len(body), sha256=sha256, token=1)
    with suppress(CheckpointCorruptError):
        read_payload(store, checkpoint)

"""Stores for tests: one in memory whose clock a test can turn, and a wrapper that injects faults into any."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from tests.conftest import eventually


@dataclass
class Clock:
    """This machine's clock, which can be put ahead."""

    ahead: timedelta = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


def memory_store() -> MemoryStore:
    return MemoryStore(clock=Clock())


def wait_until(store: Store, moment: datetime) -> None:
    """Let the store's clock pass `moment`."""
    if isinstance(store, MemoryStore):
        assert isinstance(store.clock, Clock)
        store.clock.ahead += max(moment - store.now(), timedelta(0)) + timedelta(milliseconds=1)
    eventually(lambda: store.now() > moment)


def begin_upload(store: Any, key: str) -> None:
    """Begin a multipart upload, send a part, and come no further."""
    if isinstance(store, MemoryStore):
        store.begin_upload(key)
        return
    where = {"Bucket": store.bucket, "Key": store.prefix + key}
    upload = store._client.create_multipart_upload(**where)["UploadId"]
    store._client.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"part")


@dataclass
class _Fault:
    method: str
    key: str
    error: Exception
    is_done_first: bool
    times: float


@dataclass
class Faulty:
    """Another store, with faults where a test plans them. It counts the calls by method and first part of the key."""

    inner: Store
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    planned: list[_Fault] = field(default_factory=list)

    def fail(self, method: str, error: Exception, key: str = "", times: float = 1) -> None:
        """Raise this from the next calls with a key that begins with `key`, instead of doing anything."""
        self.planned.append(_Fault(method, key, error, False, times))

    def lose_response(self, method: str, error: Exception, key: str = "") -> None:
        """Do what the next call with a key that begins with `key` asks for, and then raise this."""
        self.planned.append(_Fault(method, key, error, True, 1))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)
        return self._faulty(name, method) if callable(method) else method

    def _faulty(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            key = str(arguments[0]) if arguments else ""
            self.calls[name, key.partition("/")[0]] += 1
            fault = next((fault for fault in self.planned if fault.method == name and key.startswith(fault.key)), None)
            if not fault:
                return method(*arguments, **more)
            fault.times -= 1
            if not fault.times:
                self.planned.remove(fault)
            if fault.is_done_first:
                method(*arguments, **more)
            raise fault.error

        return call

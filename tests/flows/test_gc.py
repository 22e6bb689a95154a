"""The flow that tidies up every day."""

from pathlib import Path

import pytest

from flows.gc import gc
from nightshift.records.keys import report_key
from nightshift.storage.store import Store
from nightshift.workspace import Workspace


def test_what_is_an_orphan_is_deleted_and_counted(
    workspace: Workspace, home: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = workspace.store
    store.put(report_key("no-such-run", "report.html"), b"report")
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(home))
    monkeypatch.setenv("NIGHTSHIFT_S3__PREFIX", prefix)
    monkeypatch.setenv("NIGHTSHIFT_KEEP__NIGHTS", "30")
    assert gc.fn(older_than_hours=0) == {"deleted": 1, "bytes": len(b"report")}
    assert list(store.list("")) == []

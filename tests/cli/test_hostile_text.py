"""What others have written is shown by every command, and obeyed by none."""

import io
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from rich.table import Table

from nightshift.cli.common import print_error
from nightshift.cli.screen import Screen, joined, styled
from nightshift.errors import StorageError
from nightshift.records.history import History, Transition
from nightshift.records.keys import record_key
from nightshift.records.run import Event, Lease, Origin, Result, RunRecord
from nightshift.refs import DatasetRef
from nightshift.storage import documents
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.conftest import small_config
from tests.hostile import HOSTILE, is_harmless

TEXTS = list(HOSTILE.values())
ALL = " ".join(TEXTS)
LINES = [text for text in TEXTS if re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{0,900}", text)]
"""Those that most places of a stored object may hold."""
LINE = " ".join(LINES)
SHA256 = "0" * 64
NOW = datetime(2026, 11, 25, tzinfo=UTC)


def hostile_record() -> RunRecord:
    """A record that has each text wherever its format lets it."""
    config = small_config()
    return RunRecord(
        run_id="run",
        status="finished",
        config=config.model_dump(mode="json"),
        config_digest=config.digest,
        dataset=DatasetRef(name=LINE, digest=SHA256, key=LINE, source=LINE),
        environment={text: text for text in LINES},
        origin=Origin(deployment=LINE),
        lease=Lease(owner=LINE, process=LINE, token=1, expires_at=NOW),
        total_steps=40,
        result=Result(test_accuracy=0.5, test_loss=1, weights_sha256=SHA256, model=LINE),
        events=[Event(at=NOW, what=LINE, step=1, owner=LINE, detail=text) for text in TEXTS],
        created_at=NOW,
        updated_at=NOW,
    )


@pytest.fixture
def hostile(workspace: Workspace) -> Workspace:
    """A store in which somebody has written a run, a history of champions, and orphans."""
    store, record = workspace.store, hostile_record()
    documents.write(store, record_key(record.run_id), record, None)
    for text in TEXTS:
        if 0 < len(text) < 1000 and "/" not in text:
            store.put(f"models/{text}/nobody/weights.pth", b"")
    transitions = [
        Transition(
            id=text,
            at=NOW,
            what="promoted",
            version="run",
            run_id="run",
            test_accuracy=0.5,
            previous="run",
            by=text,
            reason=text,
        )
        for text in LINES
    ]
    documents.write(store, "models/cifar10/champion.json", History(name="cifar10", transitions=transitions), None)
    return workspace


def test_every_command_that_shows_what_is_stored_shows_it_harmless(
    hostile: Workspace, nightshift: Callable[..., Finished]
) -> None:
    for command in (("runs",), ("champion",), ("gc", "--dry-run", "--older-than-hours", "0"), ("show", "run")):
        done, exact = nightshift(*command), nightshift(*command, "--json")
        assert (done.exit_code, exact.exit_code, done.err, exact.err) == (0, 0, "", ""), command
        assert is_harmless(done.out), command
        assert is_harmless(exact.out.replace(HOSTILE["a password"], "")), command
    assert r"\x1b]0;owned\x07\x1b[2J" in done.out
    assert [event["detail"] for event in exact.json["events"]] == TEXTS


def test_a_watched_run_may_end_with_any_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.states import Failed

    from deployments import submit as submission
    from nightshift.cli.submit import _follow

    def ends(submitted: submission.Submitted) -> Iterator[Any]:
        yield from (Failed(name=text or "x", message=text) for text in TEXTS)

    monkeypatch.setattr(submission, "watch", ends)
    submitted = submission.Submitted(UUID(int=0), ALL, "http://user:secret@host/runs/1", None)
    for as_json in (False, True):
        assert _follow(submitted, watch=True, as_json=as_json)[1] is False
    printed = capsys.readouterr()
    assert is_harmless(printed.out)
    assert is_harmless(printed.err)


def test_an_error_may_quote_anything_and_have_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(StorageError("\n".join(TEXTS)))
    printed = capsys.readouterr().err
    assert is_harmless(printed)
    assert printed.startswith("Error: [/red]\n[link=file:///etc/passwd]x[/link]\n")


def test_on_a_terminal_only_our_own_styles_are_sent() -> None:
    file = io.StringIO()
    screen = Screen(file=file, force_terminal=True, width=100)
    table = Table(title=ALL)
    table.add_column(ALL)
    table.add_column(styled(ALL, "bold"))
    for text in TEXTS:
        table.add_row(text, styled(text, "red"))
        screen.print(text, joined(text, styled(text, "green")), {text: text})
    screen.print(table)
    assert is_harmless(re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()))

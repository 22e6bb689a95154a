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
from nightshift.records.champions import History, Transition
from nightshift.records.keys import record_key
from nightshift.records.run import Checkpoint, CheckpointMetrics, Event, Lease, Origin, Result, RunRecord
from nightshift.refs import DatasetRef
from nightshift.storage import documents
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.conftest import small_config
from tests.hostile import HOSTILE, is_harmless

TEXTS = list(HOSTILE.values())
ALL = " ".join(TEXTS)
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
        dataset=DatasetRef(name=ALL, digest=SHA256, key=ALL, source=ALL),
        environment={text: text for text in TEXTS},
        origin=Origin(flow_run_id=ALL, deployment=ALL),
        lease=Lease(owner=ALL, process=ALL, token=1, expires_at=NOW),
        checkpoints=[
            Checkpoint(
                step=1,
                epoch=0,
                key=f"checkpoints/run/{text}",
                bytes=1,
                sha256=SHA256,
                written_at=NOW,
                metrics=CheckpointMetrics(train_seconds=1),
            )
            for text in TEXTS
        ],
        total_steps=40,
        result=Result(test_accuracy=0.5, test_loss=1, weights_sha256=SHA256, model=ALL),
        events=[Event(at=NOW, what=text, step=1, owner=text, detail=text) for text in TEXTS],
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
            version=text,
            run_id="run",
            test_accuracy=0.5,
            previous=text,
            by=text,
            reason=text,
        )
        for text in TEXTS
    ]
    documents.write(store, "models/cifar10/champion.json", History(name=ALL, transitions=transitions), None)
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


def test_a_damaged_checkpoint_is_reported_whatever_its_key_is(
    hostile: Workspace, nightshift: Callable[..., Finished]
) -> None:
    done = nightshift("verify", "run")
    assert (done.exit_code, done.err) == (1, "")
    assert is_harmless(done.out)
    assert "checkpoints/run/[/red]  bad: " in done.out


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

"""The example that grows, `examples/emoji`: five of its nights, each with more images than the night before."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nightshift.data import rows as table
from nightshift.data.stored import read_rows
from nightshift.judging.evaluation import evaluate
from nightshift.records.run import dataset_of, read_record
from nightshift.records.snapshots import read_history
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.commands import Command
from tests.conftest import eventually

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji"
VERSIONS = ("4.0", "5.0", "11.0", "12.0", "12.1")


def add_emoji(folder: Path, version: str) -> None:
    """What comes on a day: the emoji of the next version, beside those there are."""
    made = subprocess.run(
        [sys.executable, EXAMPLE / "make.py", "--version", version, folder], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.soak
def test_five_nights_read_each_image_once_keep_its_split_and_a_killed_night_ends_with_its_own_images(
    start: Callable[..., Command], workspace: Workspace, prefect_api: str, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLE / "nightshift.toml", tmp_path)

    def night(number: int, epochs: int = 1) -> Command:
        add_emoji(tmp_path / "emoji", VERSIONS[number - 1])
        changes = ("--set", f"epochs={epochs}", "--set", "checkpoint_every_steps=10")
        return start(
            *("train", "--recipe", "emoji", "--run-id", f"night-{number}", "--json", *changes),
            PREFECT_API_URL=prefect_api,
        )

    def is_saved() -> bool:
        return bool(store.head(f"runs/{killed}.json") and read_record(store, killed)[0].checkpoints)

    store, killed = workspace.store, "night-2"
    first = night(1).finish()
    assert first.exit_code == 0, first.err
    second = night(2, epochs=3)
    eventually(is_saved)
    second.send(signal.SIGKILL)
    assert second.finish().exit_code == -signal.SIGKILL
    assert night(3).finish().exit_code == 0
    ended = start("resume", killed, "--json", PREFECT_API_URL=prefect_api).finish()
    assert ended.exit_code == 0, ended.err
    for number in (4, 5):
        assert night(number).finish().exit_code == 0

    entries = read_history(store, "emoji").entries
    assert [entry.images for entry in entries] == sorted({entry.images for entry in entries})
    assert len(entries) == len(VERSIONS)
    assert sum(entry.read for entry in entries) == entries[-1].images
    splits: dict[str, str] = {}
    for entry in entries:
        tonight = dict(table.iterate(read_rows(store, "emoji", entry.digest)[1], "id", "split"))
        assert splits.items() <= tonight.items()
        splits = tonight

    dataset = dataset_of(store, killed)
    assert dataset
    assert dataset.digest == entries[1].digest
    assert ended.json["resumed_from_step"] > 0
    whole = train_alone(workspace, "whole", read_record(store, killed)[0].train_config(), dataset)
    assert ended.json["weights_sha256"] == evaluate(workspace, whole, dataset).weights_sha256

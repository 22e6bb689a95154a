"""A full disk below the embedded S3: told in a sentence, survived by all who wait for room, and gone with it."""

from pathlib import Path

import pytest

from nightshift.refs import DatasetRef
from nightshift.storage.s3 import MIB
from tests.local import small_disk

pytestmark = small_disk.needs_a_mount


def test_what_only_reads_and_gc_need_no_room_and_writes_come_back_with_it(tmp_path: Path) -> None:
    found = small_disk.run("reads_and_gc", tmp_path / "disk", megabytes=400)
    for name in ("runs", "listed", "deleted"):
        assert found[name]["exit_code"] == 0, found[name]["err"]
    assert "there is no run 'missing'" in found["show"]["err"]
    assert "deleted 0 objects" not in found["deleted"]["out"]
    assert found["seconds"] < 60


@pytest.mark.soak
def test_a_store_whose_files_are_full_is_written_to_as_long_as_the_disk_is_not(tmp_path: Path) -> None:
    found = small_disk.run("files_are_full", tmp_path / "disk", megabytes=400)
    assert found["largest"] > 64 * MIB
    assert 1.1 * found["limit"] < found["free"] < 64 * MIB, "no room for one more file of the largest size"
    assert found["body"] == "body"
    assert found["runs"]["exit_code"] == 0, found["runs"]["err"]


@pytest.mark.soak
def test_a_server_that_has_no_room_to_start_is_told_in_one_line_within_two_seconds(tmp_path: Path) -> None:
    found = small_disk.run("not_running", tmp_path / "disk", megabytes=200)
    assert found["runs"]["exit_code"] == 1
    assert "the disk is full: 0.0 of 210 MB are free for " in found["runs"]["err"]
    assert found["runs"]["err"].count("\n") == 1
    assert found["seconds"] < 2
    assert found["body"] == "body", "nothing that was there is damaged"


@pytest.mark.soak
def test_what_a_full_prefect_server_would_have_to_write_is_told_in_one_line(tmp_path: Path) -> None:
    found = small_disk.run("submitting", tmp_path / "disk", megabytes=200)
    assert found["exit_code"] == 1
    assert "the Prefect server of this machine cannot write: the disk is full: 0.0 of 210 MB are free" in found["err"]
    assert found["err"].count("\n") == 1


def test_a_run_whose_disk_was_full_ends_with_the_same_bits(tmp_path: Path, home: Path, cifar10: DatasetRef) -> None:
    datasets = {"DATASETS": str(home / "datasets"), "DATASET": cifar10.model_dump_json()}
    found = small_disk.run("training", tmp_path / "disk", megabytes=400, **datasets)
    undisturbed, disturbed = found["sha256"]
    assert "the disk is full" in found["warnings"][0]
    assert disturbed == undisturbed

"""The flow `retrain` in a process of its own: a run keeps what it began with."""

from collections.abc import Callable
from pathlib import Path

from nightshift.errors import RunNotFoundError
from nightshift.records.run import read_record
from nightshift.workspace import Workspace
from tests.commands import Command, Finished
from tests.conftest import eventually
from tests.own_images import DATASET, write_images


def test_a_run_that_was_killed_ends_with_its_own_bits_though_images_came_and_the_project_file_went(
    start: Callable[..., Command],
    nightshift: Callable[..., Finished],
    workspace: Workspace,
    tmp_path: Path,
    prefect_api: str,
) -> None:
    (tmp_path / "nightshift.toml").write_text(DATASET.replace("image_size", "retrain_unchanged = true\nimage_size"))
    write_images(tmp_path, range(150))
    train = ("train", "--recipe=parts", "--set=epochs=20", "--json")
    whole = nightshift(*train, "--run-id=whole", PREFECT_API_URL=prefect_api)
    assert whole.exit_code == 0, whole.err

    def has_saved() -> bool:
        try:
            return bool(read_record(workspace.store, "killed")[0].checkpoints)
        except RunNotFoundError:
            return False

    killed = start(*train, "--run-id=killed", PREFECT_API_URL=prefect_api)
    eventually(has_saved, timeout=120)
    killed.kill()
    write_images(tmp_path, range(150, 180))
    (tmp_path / "nightshift.toml").unlink()
    recovered = nightshift("recover", "--json", PREFECT_API_URL=prefect_api)
    assert recovered.json["started"] == ["killed"], recovered.err
    record, _ = read_record(workspace.store, "killed")
    assert [event.what for event in record.events] == ["started", "recovered", "resumed", "finished"]
    assert record.dataset.digest == whole.json["snapshot"]
    assert record.result
    assert record.result.weights_sha256 == whole.json["weights_sha256"]

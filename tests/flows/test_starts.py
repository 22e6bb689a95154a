"""A recipe of nightshift.toml that begins with the champion: by the command line, night after night."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nightshift.records.run import read_record
from nightshift.records.versions import read_card
from nightshift.workspace import Workspace
from tests.commands import Command, Finished
from tests.conftest import eventually
from tests.own_images import EVERY_NIGHT, has_saved, write_images

TUNED = """
[recipes.tuned]
base = "finetune"
dataset = "parts"
model = "simple_cnn"
start = "champion"
normalization = "dataset"
epochs = 20
checkpoint_every_steps = 2
"""


@pytest.mark.soak
def test_a_killed_fine_tuning_of_the_champion_ends_with_its_own_bits_though_another_went_live(
    start: Callable[..., Command],
    nightshift: Callable[..., Finished],
    workspace: Workspace,
    tmp_path: Path,
    prefect_api: str,
) -> None:
    (tmp_path / "nightshift.toml").write_text(EVERY_NIGHT + TUNED)
    write_images(tmp_path, range(150))

    def train(recipe: str, run_id: str, **environment: str) -> Finished:
        names = (f"--recipe={recipe}", f"--run-id={run_id}", "--json")
        done = nightshift("train", *names, PREFECT_API_URL=prefect_api, **environment)
        assert done.exit_code == 0, done.err
        return done

    train("parts", "first")
    whole = train("tuned", "whole", NIGHTSHIFT_GATE__MIN_ACCURACY="1")
    assert whole.json["parent"]["source"] == "first"
    killed = start("train", "--recipe=tuned", "--run-id=killed", "--json", PREFECT_API_URL=prefect_api)
    eventually(partial(has_saved, workspace.store, "killed"))
    killed.kill()
    assert nightshift("promote", "whole", "--name=parts").exit_code == 0
    resumed = nightshift("resume", "killed", "--json", PREFECT_API_URL=prefect_api)
    assert resumed.json["resumed_from_step"], resumed.err
    assert resumed.json["weights_sha256"] == whole.json["weights_sha256"]
    assert resumed.json["parent"] == whole.json["parent"]
    card = read_card(workspace.store, "parts", "killed")
    assert card.parent == read_record(workspace.store, "killed")[0].parent

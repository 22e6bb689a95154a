"""Images that do not fit into memory by far are trained on, the training is resumed, and the model is tested."""

from pathlib import Path

import pytest

from nightshift.config.project import DatasetConfig
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot
from nightshift.workspace import Workspace
from tests.faults import small_memory
from tests.faults.small_memory import SIZE, Many
from tests.own_network import NETWORK

LIMIT = 2_000_000_000


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not small_memory.may_limit(), reason="needs root and cgroups of version 1")
def test_ten_times_as_many_pixels_as_the_process_may_have_memory_are_trained_and_tested_on(
    workspace: Workspace, home: Path, prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "ournets.py").write_text(NETWORK)
    (tmp_path / "nightshift.toml").write_text('plugins = ["ournets"]\n')
    images = 10 * LIMIT // (3 * SIZE**2)
    config = DatasetConfig.model_validate({"source": "many", "image_size": SIZE})
    dataset = pack_snapshot(workspace, make_snapshot(workspace.store, "many", config, source=Many(images)))
    environment = {"NIGHTSHIFT_PROJECT": str(tmp_path / "nightshift.toml")}
    found = small_memory.run(home, prefix, dataset, LIMIT, environment)
    print(found)
    assert found["resumed"] == 300
    assert found["step"] == pytest.approx(0.8 * images / 128, rel=0.02)
    assert found["tested"] == pytest.approx(0.1 * images, rel=0.05)
    assert found["peak"] <= LIMIT

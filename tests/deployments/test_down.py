"""What `down` says that it has stopped."""

from pathlib import Path

from deployments.local import down
from nightshift.local import supervisor
from nightshift.local.s3 import embedded_s3
from nightshift.settings import Settings


def test_down_names_a_server_that_somebody_still_uses_and_does_not_say_that_it_stopped(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with embedded_s3(tmp_path) as store:
        supervisor.keep(tmp_path / "s3")
        assert down(settings) == ([], ["s3"])
        store.put("still", b"there")
    assert down(settings) == ([], [])

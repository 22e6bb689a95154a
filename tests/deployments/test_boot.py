"""`nightshift up --install`: a unit of systemd that starts everything with the machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments import boot
from nightshift.cli.server import _print_installed
from nightshift.errors import SettingsError
from tests.commands import Finished


@pytest.fixture
def unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the unit is written, beside nobody's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    # No systemd is to be told of it: it would take this for the unit of whoever runs the tests.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    return tmp_path / "config" / "systemd" / "user" / boot.UNIT


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="only systemd knows what a unit may say")
def test_systemd_finds_nothing_wrong_with_the_unit_whatever_the_home_is_called(tmp_path: Path) -> None:
    home = tmp_path / 'a home, 100% "mine" for $HOME'
    home.mkdir()
    (unit := tmp_path / boot.UNIT).write_text(boot.unit_text(home, home, save_retry_seconds=120))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", unit],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, boot.UNIT in done.stderr) == (0, False), done.stderr


def test_the_unit_starts_with_up_and_stops_with_down_in_the_directory_of_the_project(tmp_path: Path) -> None:
    lines = boot.unit_text(tmp_path / "home", tmp_path, save_retry_seconds=120).splitlines()
    program = Path(sys.executable).with_name("nightshift")
    for line in (
        f'ExecStart="{program}" up',
        f'ExecStop="{program}" down',
        f"WorkingDirectory={tmp_path}",
        f'Environment="NIGHTSHIFT_HOME={tmp_path / "home"}"',
        "TimeoutStopSec=240",
        "WantedBy=default.target",
    ):
        assert line in lines


def test_a_unit_is_written_again_for_its_own_home_and_not_over_that_of_another(unit: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert boot.install(tmp_path / "one", tmp_path, save_retry_seconds=120).path == unit
    with pytest.raises(SettingsError, match=r"starts another nightshift than that of .*/two: .*up --uninstall"):
        boot.install(tmp_path / "two", tmp_path, save_retry_seconds=120)
    assert f"{tmp_path / 'one'}" in unit.read_text()


def test_uninstall_removes_the_unit_and_says_so(
    unit: Path, tmp_path: Path, nightshift: Callable[..., Finished]
) -> None:
    boot.install(tmp_path / "one", tmp_path, save_retry_seconds=120)
    assert nightshift("up", "--uninstall").out.splitlines()[0] == f"removed: {unit}"
    assert not unit.exists()
    assert nightshift("up", "--uninstall", "--json").json == {"removed": None}


def test_settings_of_the_shell_that_the_unit_will_not_know_are_named_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("NIGHTSHIFT_NOTIFY=slack-webhook/nightshift\n")
    settings = {"NOTIFY": "slack-webhook/nightshift", "PROJECT": str(tmp_path / "nightshift.toml"), "DASK": "local"}
    for name, value in settings.items():
        monkeypatch.setenv(f"NIGHTSHIFT_{name}", value)
    _print_installed(boot.Installed(tmp_path / "nightshift.service", []))
    said = capsys.readouterr().out
    assert "NIGHTSHIFT_DASK" in said
    assert "NOTIFY" not in said
    assert "PROJECT" not in said

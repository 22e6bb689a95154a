"""`nightshift up` at every start of the machine: a unit of the user's systemd."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nightshift.errors import SettingsError

UNIT = "nightshift.service"

_TEXT = """\
# Written by `nightshift up --install`; `nightshift up --uninstall` removes it.
[Unit]
Description=nightshift of {home}
StartLimitIntervalSec=0

[Service]
Type=oneshot
RemainAfterExit=yes
# Settings are in the .env there, and the schedules in its nightshift.toml.
WorkingDirectory={directory}
Environment={environment}
ExecStart={program} up
ExecStop={program} down
Restart=on-failure
RestartSec=30
TimeoutStartSec=600
TimeoutStopSec={stop_seconds:.0f}

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True)
class Installed:
    """A unit that was written, and what is still to be typed, if systemd could not be told."""

    path: Path
    to_type: list[str]


def unit_text(home: Path, directory: Path, save_retry_seconds: float) -> str:
    """The unit that runs `nightshift up` in `directory`, and `down` before the machine stops."""
    return _TEXT.format(
        home=_plain(home),
        directory=_plain(directory),
        environment=_quoted(f"NIGHTSHIFT_HOME={home}"),
        # In commands alone, a dollar sign begins a variable.
        program=_quoted(str(Path(sys.executable).with_name("nightshift"))).replace("$", "$$"),
        stop_seconds=save_retry_seconds + 120,
    )


def install(home: Path, directory: Path, save_retry_seconds: float) -> Installed:
    """Write the unit and enable it.

    Raises:
        SettingsError: there is one of another home.
    """
    path, text = _path(), unit_text(home, directory, save_retry_seconds)
    mine = f"Environment={_quoted(f'NIGHTSHIFT_HOME={home}')}"
    if path.exists() and mine not in path.read_text().splitlines():
        raise SettingsError(
            f"{path} starts another nightshift than that of {home}: remove it with `nightshift up --uninstall`, then "
            "try again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Installed(path, _told([["daemon-reload"], ["enable", UNIT]]))


def uninstall() -> Installed | None:
    """Remove the unit; None if there is none. What runs goes on."""
    path = _path()
    if not path.exists():
        return None
    to_type = _told([["disable", UNIT]])  # while there still is one
    path.unlink()
    return Installed(path, to_type or _told([["daemon-reload"]]))


def _path() -> Path:
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "systemd" / "user" / UNIT


def _told(commands: list[list[str]]) -> list[str]:
    """Give systemd these commands; return those that it did not take, as they are typed."""
    systemctl = ["systemctl", "--user"]
    for number, command in enumerate(commands):
        if (
            not shutil.which("systemctl")
            or subprocess.run([*systemctl, *command], stdin=subprocess.DEVNULL, capture_output=True).returncode
        ):
            return [" ".join([*systemctl, *left]) for left in commands[number:]]
    return []


def _plain(text: object) -> str:
    """As systemd reads a value of one word or many: it would replace what follows a percent sign."""
    return str(text).replace("%", "%%")


def _quoted(text: str) -> str:
    """As systemd reads a word in quotes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_plain(escaped)}"'

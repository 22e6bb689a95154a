"""The commands for a Prefect server and its workers: `up`, `down`, `deploy`, `worker`."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nightshift.cli.common import AsJson, app, console, error_console, planned_deployments, print_json, use_server
from nightshift.errors import ConfigError

if TYPE_CHECKING:
    from deployments.apply import Deployed
    from deployments.boot import Installed
    from nightshift.settings import Settings

_PANEL = "Servers and machine"


@app.command(rich_help_panel=_PANEL)
def up(
    install: Annotated[
        bool, typer.Option("--install", help="Also start them whenever this machine starts, by a unit of systemd.")
    ] = False,
    uninstall: Annotated[
        bool, typer.Option("--uninstall", help="Only undo --install. What runs goes on, until `down`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start S3, a Prefect server and a worker on this machine, with everything deployed; they stay."""
    if install and uninstall:
        raise ConfigError("--install and --uninstall at once: choose one")
    if uninstall:
        _uninstall(as_json)
        return
    from nightshift.cli.terminal import TerminalProgress, facts_table

    settings = _settings_for_workers()
    deployments = planned_deployments(settings)
    with TerminalProgress(error_console()) as display, display.waiting("starting S3, Prefect and a worker"):
        from deployments import local

        running = local.up(settings, deployments)
    installed = None
    if install:
        from deployments import boot

        installed = boot.install(settings.home, Path.cwd(), settings.save_retry_seconds)
    if as_json:
        print_json(
            {
                "prefect_ui": running.prefect_ui,
                "s3_endpoint": running.s3_endpoint,
                "prefect_api_url": running.api_url,
                "prefect_login_file": str(running.login_file),
                **_as_dict(running.deployed),
                "unit": installed and str(installed.path),
            }
        )
        return
    console().print(
        facts_table(
            {
                "Prefect": running.prefect_ui,
                "S3": running.s3_endpoint,
                "deployments": "  ".join(running.deployed.deployments),
                "train now": "nightshift submit --watch",
                "stop it all": "nightshift down",
            }
        ),
        soft_wrap=True,
    )
    _print_remarks(running.deployed)
    login = f"cat {shlex.quote(str(running.login_file))}"
    # Not the login itself: it would stay in logs and in the terminal's history. No table either, which would break a
    # line that is to be copied.
    for line in (
        *("", "Prefect asks for a login, in the browser once. It is what this prints:", "", f"  {login}", ""),
        *("For commands of Prefect's own, first type:", ""),
        f'  export PREFECT_API_URL={running.api_url} PREFECT_API_AUTH_STRING="$({login})"',
    ):
        console().print(line, soft_wrap=True)
    if installed:
        _print_installed(installed)


def _print_installed(installed: "Installed") -> None:
    from dotenv import dotenv_values

    done = "is enabled" if not installed.to_type else "is written, but systemd could not be told. Type:"
    console().print()
    console().print(f"At the start of this machine: {installed.path} {done}", soft_wrap=True)
    for line in installed.to_type:
        console().print(f"  {line}", soft_wrap=True)
    known = {"NIGHTSHIFT_HOME", *dotenv_values(".env")}
    if os.environ.get("NIGHTSHIFT_PROJECT") == str(Path("nightshift.toml").absolute()):  # where it looks by itself
        known.add("NIGHTSHIFT_PROJECT")
    if ours := sorted(name for name in os.environ.keys() - known if name.startswith("NIGHTSHIFT_")):
        file = Path.cwd() / ".env"
        console().print(f"It does not know {', '.join(ours)}, set in this shell: write it to {file}", soft_wrap=True)
    console().print("Without a login of yours, systemd starts it only after: loginctl enable-linger", soft_wrap=True)


def _uninstall(as_json: bool) -> None:
    from deployments import boot

    removed = boot.uninstall()
    if as_json:
        print_json({"removed": removed and str(removed.path)})
        return
    console().print(f"removed: {removed.path if removed else 'nothing was installed'}", soft_wrap=True)
    if removed and removed.to_type:
        console().print("systemd could not be told. Type:")
        for line in removed.to_type:
            console().print(f"  {line}", soft_wrap=True)


@app.command(rich_help_panel=_PANEL)
def down(as_json: AsJson = False) -> None:
    """Stop what `up` has started; runs in progress are saved first."""
    from nightshift.cli.terminal import TerminalProgress
    from nightshift.settings import Settings

    with TerminalProgress(error_console()) as display, display.waiting("stopping; runs in progress save first"):
        from deployments import local

        stopped, used = local.down(Settings.load())
    if as_json:
        print_json({"stopped": stopped, "in_use": used})
        return
    console().print(f"stopped: {', '.join(stopped) or ('nothing' if used else 'nothing was running')}")
    if used:
        console().print(f"still in use by a command that runs here, and stopped after it: {', '.join(used)}")


@app.command(rich_help_panel=_PANEL)
def deploy(
    replace_schedules: Annotated[
        bool, typer.Option("--replace-schedules", help="Also those that somebody has changed on the server.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make or update nightshift's work pools, deployments and automations on the Prefect server."""
    from nightshift.settings import Settings

    settings = Settings.load()
    planned = planned_deployments(settings)
    use_server()
    from deployments.apply import apply

    deployed = apply(planned, settings.project, settings.notify, replace_schedules)
    if as_json:
        print_json(_as_dict(deployed))
        return
    console().print(f"deployed: {', '.join(deployed.deployments)}", soft_wrap=True)
    _print_remarks(deployed)


def _as_dict(deployed: "Deployed") -> dict[str, list[str]]:
    kept = [entry.deployment for entry in deployed.kept]
    return {"deployments": deployed.deployments, "kept": kept, "others": deployed.others}


def _print_remarks(deployed: "Deployed") -> None:
    from nightshift.cli.screen import styled

    for remark in deployed.remarks:
        console().print(styled("!", "yellow"), remark, soft_wrap=True)


@app.command(rich_help_panel=_PANEL)
def worker(
    pool: Annotated[str, typer.Option(help="The work pool to work for.")] = "gpu-process",
    limit: Annotated[int | None, typer.Option(min=1, help="Runs at a time; 1 for a GPU.")] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Import torch once, for all runs: each starts seconds sooner.")
    ] = False,
) -> None:
    """Be a Prefect worker whose runs are saved when it is stopped."""
    settings = _settings_for_workers()
    use_server()
    from deployments.worker import run

    sys.exit(run(pool, limit, warm, grace_seconds=settings.save_retry_seconds + 30))


def _settings_for_workers() -> "Settings":
    """The settings, written to the environment for the processes of flow runs, which start in other directories."""
    from dotenv import load_dotenv

    from nightshift.settings import Settings

    settings = Settings.load()
    load_dotenv(".env")
    os.environ["NIGHTSHIFT_HOME"] = str(settings.home.resolve())
    os.environ["NIGHTSHIFT_PROJECT"] = str(settings.project.absolute())
    return settings

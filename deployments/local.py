"""Everything on one machine: embedded S3, a Prefect server and workers, which stay until `down` stops them."""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.planned import Deployments
from nightshift.local import supervisor
from nightshift.local.prefect import POOL, WAITING_POOL, PrefectServer, local_prefect, login_file, online_workers
from nightshift.local.s3 import embedded_s3
from nightshift.local.supervisor import Server, using, wait_until
from nightshift.settings import Settings

if TYPE_CHECKING:
    from deployments.apply import Deployed

_WORKERS = {"worker": POOL, "waiting-worker": WAITING_POOL}
_SERVERS = (*_WORKERS, "prefect", "s3")


@dataclass(frozen=True)
class Running:
    """What `up` has left running."""

    api_url: str
    login_file: Path
    """What the server asks for is in this file, which only the user can read."""
    s3_endpoint: str
    deployed: "Deployed"

    @property
    def prefect_ui(self) -> str:
        return self.api_url.removesuffix("/api")


def up(settings: Settings, deployments: Deployments) -> Running:
    """Start what is not running yet, and deploy everything again. Repeating it does no harm.

    Workers that know another project file are replaced; their runs save first, and go on.

    Raises:
        LocalServiceError: a server or a worker does not start.
        PrefectServerError: the server refuses a deployment.
    """
    home, project = settings.home.resolve(), str(settings.project.absolute())
    with ExitStack() as stack:
        server, wait_for_server = stack.enter_context(local_prefect(home))
        supervisor.keep(home / "prefect")
        endpoint = settings.s3.endpoint_url or "AWS"
        if not settings.s3.bucket:
            endpoint = stack.enter_context(embedded_s3(home)).endpoint
            supervisor.keep(home / "s3")
        wait_for_server()
        os.environ.update(server.environment)
        from deployments.apply import apply

        deployed = apply(deployments, settings.project, settings.notify)
        for name, pool in _WORKERS.items():
            known = supervisor.running_facts(home / name)
            if known and known.get("project") != project:
                supervisor.release(home / name)
            plan = partial(_worker, home, project, server, pool, settings.save_retry_seconds)
            stack.enter_context(using(home / name, plan))
            supervisor.keep(home / name)
        for name, pool in _WORKERS.items():
            wait_until(partial(_is_served, server, pool), home / name)
    return Running(server.api_url, login_file(home), endpoint, deployed)


def down(settings: Settings) -> tuple[list[str], list[str]]:
    """Stop what `up` has started. Workers go first and let their runs save.

    Returns the names of those that were stopped, and of those that are in use and stop after their last user.
    """
    released = [home for name in _SERVERS if supervisor.release(home := settings.home.resolve() / name)]
    used = [home.name for home in released if supervisor.running_facts(home)]
    return [home.name for home in released if home.name not in used], used


def _is_served(server: PrefectServer, pool: str) -> bool:
    return bool(online_workers(server, pool))


def _worker(home: Path, project: str, server: PrefectServer, pool: str, save_retry_seconds: float) -> Server:
    return Server(
        command=[
            *(str(Path(sys.executable).with_name("nightshift")), "worker", "--pool", pool),
            *(["--warm"] if pool == POOL else []),
        ],
        environment={
            "NIGHTSHIFT_HOME": str(home),
            "NIGHTSHIFT_PROJECT": project,
            "PREFECT_HOME": str(home / "prefect"),
            **server.environment,
            "DO_NOT_TRACK": "1",
        },
        facts={"project": project},
        stop_seconds=save_retry_seconds + 60,
    )

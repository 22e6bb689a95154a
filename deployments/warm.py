"""Flow runs in processes that are forked from one that has imported what a training needs.

A new Python imports for seconds before a flow run's first line. Python's fork server does so once. A process that it
forks takes over the environment and the directory of the flow run, and then is Prefect's engine.

Forking is sound if three things hold. The server has no threads but those of OpenBLAS and jemalloc, which know about
forks. It has not touched a GPU. And nothing that it has imported would be different in a new Python: no file, no
variable that is read during the import, and none of Prefect's settings, which are read then too. Otherwise the process
says why, and becomes a new Python: as slow as without all this.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Set
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

# Most optimizers import torch._dynamo, the publication torch.export and the report scipy.stats: ten seconds.
HEAVY = ("torch._dynamo", "torch.export", "torch._functorch.aot_autograd", "networkx", "scipy.stats", "pyarrow.parquet")
OF_PREFECT = ("prefect.main", "prefect.flow_engine", "prefect._internal.metrics")
OURS = (
    "nightshift.data.snapshot",
    "nightshift.judging.plots",
    "nightshift.judging.report",
    "nightshift.local.s3",
    "nightshift.publishing.export",
    "nightshift.training.run",
)
OF_EVERY_RUN = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_LOGGING_EXTRA_LOGGERS": "nightshift"}
"""What our work pools say to every flow run. The server must know it before it imports Prefect."""
_READ_LATE = ("AWS_", "MLFLOW_", "NIGHTSHIFT_", "PREFECT__")
"""Variables whose names begin so are read by a flow run, and by nothing that is imported before it."""


class Forks:
    def __init__(self) -> None:
        """Start the server, which imports from now on. A process that is started sooner waits for it."""
        for name, value in OF_EVERY_RUN.items():
            os.environ.setdefault(name, value)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*HEAVY, *OURS, *OF_PREFECT, "deployments.warmed", __name__])
        forkserver.ensure_running()
        self.environment = dict(os.environ)
        """What it has started with."""

    def start(self, module: str, environment: Mapping[str, str], directory: Path) -> BaseProcess:
        """A process that is `python -m module`. What it prints is printed here."""
        changed = {
            name
            for name in {*environment, *self.environment}
            if environment.get(name) != self.environment.get(name) and not name.startswith(_READ_LATE)
        }
        process = self._context.Process(target=_be, args=(module, dict(environment), directory, changed))
        process.start()
        return process


def _be(module: str, environment: Mapping[str, str], directory: Path, changed: Set[str]) -> None:
    gc.freeze()  # a search for cycles would take a copy of all that the server has imported: 135 MB
    reason = _reason_for_a_new_python()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    reason = reason or _reason_of_variables(changed)
    if reason:
        print(f"this flow run starts in a new Python: {reason}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, "-m", module])  # noqa: S606
    import numpy as np

    np.random.seed()  # as in a new Python: else all runs would draw the same
    sys.argv, sys.path[0] = [module], str(directory)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process leaves them out


def _reason_for_a_new_python() -> str | None:
    import torch

    if path := next((path for path, version in _IMPORTED.items() if _version(path) != version), None):
        return f"{path} is another file than when it was imported; a worker that starts anew imports it again"
    if _threads(os.getppid()) > _THREADS:
        return "the process to fork it from has a thread more than when it had imported all"
    if torch.cuda._is_in_bad_fork():
        return "the process to fork it from has touched a GPU"
    return None


def _reason_of_variables(changed: Set[str]) -> str | None:
    """Variables may differ if Prefect's settings, which may come from files too, are the same with them as without."""
    from prefect import context

    contexts = context.root_settings_context(), context.GLOBAL_SETTINGS_CONTEXT
    if contexts[0] == contexts[1] and not changed:
        return None  # as nearly always; the names of all settings take 0.2 s
    here, there = (found.settings.to_environment_variables() for found in contexts)
    settings = {*here, *there}
    early = (changed - settings) | {name for name in settings if here.get(name) != there.get(name)}
    return f"what is imported may read {', '.join(sorted(early))}, whose value is another here" if early else None


def _version(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - of thousands of files, which takes a Path three times as long
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


_IMPORTED = {
    path: _version(path) for module in tuple(sys.modules.values()) if (path := getattr(module, "__file__", None))
}
"""The files of all imported modules. The fork server imports this module last, so there it is all it has imported."""
_THREADS = _threads(os.getpid())

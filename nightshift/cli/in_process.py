"""The flow in this process: on the user's Prefect server or on one of our own, with a live display."""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from nightshift.cli.common import configured_workspace, error_console, use_server
from nightshift.errors import Interrupted
from nightshift.imports import imported_to_stay
from nightshift.text import plain_lines

if TYPE_CHECKING:
    from nightshift.config.train import TrainConfig
    from nightshift.records.run import RunRecord

    RunFlow = Callable[..., RunRecord]


@contextmanager
def flow_runner(verbose: bool) -> Iterator["RunFlow"]:
    """Yields what runs the flow to its end and returns the run's record.

    Its arguments are the run id, the config, whether the model may go live if it is better, the place of the images
    if they are of no data set that has a name, and the digest of an earlier snapshot if they are not tonight's.
    """
    from nightshift import progress
    from nightshift.cli.terminal import TerminalProgress
    from nightshift.config.project import load_project
    from nightshift.config.recipes import named
    from nightshift.data.specs import SPECS
    from nightshift.local.prefect import configured_server, local_prefect
    from nightshift.settings import Settings

    settings = Settings.load()
    quieten(verbose)
    # As in the work pools: the automations of a server take a run for lost that was silent for 90 s, and Prefect's own
    # default is a heartbeat every 180 s.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    # Prefect sends a SIGTERM on to the handler it found: by default that would end us before we can say how we ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        display = stack.enter_context(TerminalProgress(error_console()))
        stack.enter_context(progress.shown_by(display))
        wait_for_server = None
        if configured_server():
            use_server(patient=True)
        else:
            server, wait_for_server = stack.enter_context(local_prefect(settings.home))
            os.environ.update(server.environment)

        def run_flow(
            run_id: str, config: "TrainConfig", promote: bool, images: str | None = None, snapshot: str | None = None
        ) -> "RunRecord":
            with display.waiting("starting"):
                # Importing torch and Prefect takes as long as the server's start, which goes on meanwhile.
                with imported_to_stay():
                    from nightshift.training.run import check_config
                check_config(config)
                with imported_to_stay():
                    from prefect.exceptions import Abort

                    from deployments.client import errors_explained
                    from flows.retrain import retrain
                    from flows.train_cifar import TerminationSignal, train_cifar

                if wait_for_server:
                    wait_for_server()
            display.say(f"run {run_id}, recipe {config.recipe}")
            recipe, overrides = named(config, load_project(settings.project))
            try:
                with errors_explained():
                    if config.data.dataset in SPECS:
                        train_cifar(recipe, overrides, run_id, promote)
                    else:
                        retrain(recipe, overrides, run_id, promote, images, snapshot)
            except (TerminationSignal, KeyboardInterrupt):
                raise Interrupted(f"stopped. To go on: nightshift resume {run_id}") from None
            except Abort as error:  # an automation took it for lost, since its heartbeats did not arrive
                raise Interrupted(
                    f"the Prefect server has ended this flow run ({error}). To go on: nightshift resume {run_id}"
                ) from error
            return _record(run_id, config.data.dataset)

        yield run_flow


def quieten(verbose: bool) -> None:
    """Keep what is not ours off the screen; Prefect's log still reaches its server."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # else Prefect's client puts a notice about telemetry on the screen
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "nightshift")
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_PlainFormatter(logging.BASIC_FORMAT))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        return
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    warnings.simplefilter("ignore")


class _PlainFormatter(logging.Formatter):
    """Messages and tracebacks of whatever library, with nothing in them that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(plain_lines(super().format(record)))


def _record(run_id: str, dataset: str) -> "RunRecord":
    """The record of the run; of the last one, if it trained nothing because nothing has changed since."""
    from nightshift import progress
    from nightshift.errors import RunNotFoundError
    from nightshift.records.run import read_record
    from nightshift.records.snapshots import read_history

    with configured_workspace() as workspace:
        try:
            return read_record(workspace.store, run_id)[0]
        except RunNotFoundError:
            last = read_history(workspace.store, dataset).trained
            if not last:
                raise
            progress.current().say(f"nothing has changed since {last.run_id}: nothing is trained")
            return read_record(workspace.store, last.run_id)[0]

"""Processes forked from one that has imported everything heavy already, so that each starts in no time."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partialmethod
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from unittest import mock

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from deployments.warm import HEAVY, OURS

COMMANDS = ("nightshift.cli.train", "nightshift.parallel.worker")
# What Prefect imports. Prefect itself is imported by each command, which chooses a server before.
OF_PREFECT = (
    *("amplitude", "asgi_lifespan", "coolname", "fastapi", "fsspec", "graphviz", "griffe", "httpx", "humanize"),
    *("jinja2", "jsonschema", "opentelemetry.trace", "pathspec", "pendulum", "prometheus_client"),
    "websockets.asyncio.client",
)


@cache
def forked() -> ForkServerContext:
    """Where to make such processes.

    A process has one such server, and the first who wants it says what it imports. So this is to be called before any
    image is decoded, which wants it too.
    """
    assert forkserver._forkserver._forkserver_pid is None, "call forked() earlier: others have started the server"  # type: ignore[attr-defined]
    context = multiprocessing.get_context("forkserver")
    # Whoever starts a process asks all others whether they have ended. Of two threads that ask one process at the same
    # time, the second reads nothing where the first has read the exit code, and takes it for 255.
    multiprocessing.process._cleanup = lambda: None  # type: ignore[attr-defined]
    # Only what is installed is found there.
    context.set_forkserver_preload([*HEAVY, *OURS, *COMMANDS, *OF_PREFECT])
    # What the launcher of ranks gives to those that it starts itself.
    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}):
        forkserver.ensure_running()
    return context


@contextmanager
def ranks_are_forked() -> Iterator[None]:
    """Let torch's agent fork the ranks, which it starts as new Pythons otherwise."""
    forked()
    with mock.patch.object(
        LocalElasticAgent, "__init__", partialmethod(LocalElasticAgent.__init__, start_method="forkserver")
    ):
        yield

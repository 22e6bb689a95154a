"""A real MLflow server on loopback, which a test kills and starts again."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from tests.conftest import eventually


class MlflowServer:
    """Its database is a file, which stays when it is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self._port = unused.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        database, artifacts = self._folder / "mlflow.db", self._folder / "artifacts"
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)),
                    *("--workers", "1", "--backend-store-uri", f"sqlite:///{database}"),
                    *("--default-artifact-root", str(artifacts)),
                ],
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        eventually(self._answers)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
        try:
            return httpx.get(f"{self.uri}/health").is_success
        except httpx.TransportError:
            return False

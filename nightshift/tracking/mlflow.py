"""What an MLflow server is told of runs and models: always from what the store knows, never the other way.

Everything here may be done again at any time: a run is found by its id and its store, and what the server has is not
sent twice. So what could not be sent is sent the next time. `beside` calls all this in a process of its own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from nightshift.config.train import flattened
from nightshift.errors import NightshiftError, RunNotFoundError, StorageError, TrackingError
from nightshift.records.history import read_history
from nightshift.records.keys import place_of, report_key
from nightshift.records.lease import is_live
from nightshift.records.run import RunRecord, listed_records, read_record
from nightshift.settings import MlflowSettings
from nightshift.storage.store import Store
from nightshift.text import plain
from nightshift.tracking.metrics import TrainingLine, read_lines

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")
ALIAS = "champion"
RUN_ID, STORE, NAME = "nightshift.run_id", "nightshift.store", "nightshift.name"
_STEP, _RECORD = "nightshift.step", "nightshift.record"
"""Tags: up to which step the curve was sent; and the ETag of the record once all of it was."""
_STATUS = {"running": "RUNNING", "interrupted": "SCHEDULED", "finished": "FINISHED", "failed": "FAILED"}
_LINES, _PARAMS = 100, 100
"""How many lines of metrics, and how many params, go into a request. MLflow takes 1,000 metrics and 100 params."""
_LONGEST = 5000
_NO_ANSWER = "failed with exception HTTP"
"""Part of the client's message if the server does not answer. All it knows of the connection follows."""
_CLIENT = {
    # Whoever waits for this has little time, and there is a next time. By itself, MLflow would try for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
}


def send(store: Store, settings: MlflowSettings, run_id: str) -> None:
    """Tell the server how a run stands, and of the version it has published.

    Raises:
        TrackingError: the server does not answer or refuses something, or the client's package is not here.
        RunNotFoundError, StorageError: the record cannot be read.
    """
    with _server(store, settings) as server:
        server.send(run_id)


def send_all(store: Store, settings: MlflowSettings, first: str | None = None) -> list[str]:
    """Tell the server of everything that it lacks: of the run `first`, the other runs, and which versions are live.

    Returns:
        What could not be sent for a reason of its own, a sentence each.

    Raises:
        TrackingError: the server does not answer or refuses something, or the client's package is not here.
        StorageError: the store cannot be listed.
    """
    with _server(store, settings) as server:
        runs = [first] if first else []
        # A run that is being trained is sent by whoever trains it.
        tried = [_tried(server.send, run_id) for run_id in chain(runs, server.missing())]
        tried += [_tried(server.move_alias, name) for name in server.names()]
    return [problem for problem in dict.fromkeys(tried) if problem]


def send_champion(store: Store, settings: MlflowSettings, name: str) -> None:
    """Tell the server which version of a model is live now; as `send`."""
    with _server(store, settings) as server:
        server.move_alias(name)


def check(store: Store, settings: MlflowSettings) -> None:
    """Raise TrackingError if the server does not answer, or asks for another login."""
    with _server(store, settings) as server:
        server.experiments()


def _tried(what: Any, name: str) -> str | None:
    try:
        what(name)
    except TrackingError as error:
        return str(error)
    except NightshiftError as error:  # a record that is damaged or gone
        return f"{name}: {error}"
    return None


@contextmanager
def _server(store: Store, settings: MlflowSettings) -> Iterator["_Server"]:
    for name, value in _CLIENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise TrackingError(
            f"NIGHTSHIFT_MLFLOW__TRACKING_URI is set, and MLflow's client is not here ({error.name}): install "
            "nightshift[mlflow]"
        ) from None
    try:
        yield _Server(MlflowClient(settings.tracking_uri, settings.tracking_uri), store, settings.prefix)
    except MlflowException as error:
        said = str(error).split("\n")[0]
        refused = "does not answer" if _NO_ANSWER in said else f"does not take it: {plain(said[:300])}"
        raise TrackingError(f"MLflow at {settings.tracking_uri} {refused}") from None


class _Server:
    """An MLflow server, as far as it is about the runs of one store."""

    def __init__(self, client: "MlflowClient", store: Store, prefix: str) -> None:
        self._client, self._store, self._prefix = client, store, prefix

    def experiments(self) -> list[Any]:
        """Those in which nightshift has written."""
        return self._all(self._client.search_experiments, filter_string="tags.nightshift = 'true'")

    def names(self) -> list[str]:
        """The models that this store has registered, by their names in the store."""
        models = self._all(self._client.search_registered_models)
        ours = [model.tags for model in models if model.tags.get(STORE) == self._store.url("")]
        return [tags[NAME] for tags in ours if NAME in tags]

    def missing(self) -> Iterator[str]:
        """The runs that the server lacks, or of which it knows an older record, oldest first."""
        found = self._runs([experiment.experiment_id for experiment in self.experiments()])
        known = {run.data.tags.get(RUN_ID): run.data.tags.get(_RECORD) for run in found}
        for item in sorted(listed_records(self._store), key=lambda item: item.modified):
            place = place_of(item.key)
            if not place or known.get(place.run_id) == item.etag:
                continue
            try:
                record, _ = read_record(self._store, place.run_id)
            except RunNotFoundError:
                continue
            except StorageError:
                yield place.run_id  # whoever reads it again says what is wrong
            else:
                if not is_live(record.lease, self._store.now()):
                    yield place.run_id

    def send(self, run_id: str) -> None:
        record, etag = read_record(self._store, run_id)
        run = self._run(record)
        if not run:
            return
        self._send_config(run, record)
        self._send_curve(run, record)
        status = _STATUS.get(record.status, "KILLED")
        if record.status in ("running", "interrupted"):
            self._client.update_run(run.info.run_id, status)
        else:
            self._client.set_terminated(run.info.run_id, status, _milliseconds(record.updated_at))
        if record.result:
            self._register(run, record)
        self._client.set_tag(run.info.run_id, _RECORD, etag)

    def move_alias(self, name: str) -> None:
        """Point the alias at the store's champion. If the server lacks that version, it is sent first."""
        champion = read_history(self._store, name).champion
        if not champion:
            return
        model = self._prefix + name
        if not self._versions(model, champion.version):
            self.send(champion.run_id)
        for version in self._versions(model, champion.version):
            if self._model(name).aliases.get(ALIAS) != version.version:
                self._client.set_registered_model_alias(model, ALIAS, version.version)

    def _send_config(self, run: "Run", record: RunRecord) -> None:
        from mlflow.entities import Param, RunTag

        tags = {
            "nightshift.status": record.status,
            "nightshift.snapshot": record.dataset.digest,
            "nightshift.report": self._store.url(report_key(record.run_id, "report.html")),
        }
        if record.result:
            tags["nightshift.sha256"] = record.result.weights_sha256
        if record.result and record.result.verdict:
            tags["nightshift.verdict"] = plain(record.result.verdict.reason)
        self._client.log_batch(run.info.run_id, tags=[RunTag(key, value[:_LONGEST]) for key, value in tags.items()])
        # What a run was first sent with stands: MLflow lets no param change.
        params = [
            Param(key, plain(value)[:_LONGEST]) for key, value in flattened(record.config) if key not in run.data.params
        ]
        for some in _parts(params, _PARAMS):
            self._client.log_batch(run.info.run_id, params=some)

    def _send_curve(self, run: "Run", record: RunRecord) -> None:
        """The lines after the last one that was sent, then what the test images have shown."""
        from mlflow.entities import Metric, RunTag

        sent = int(run.data.tags.get(_STEP, -1))
        lines = read_lines(self._store, record.run_id)
        new = [line for line in lines if isinstance(line, TrainingLine) and line.step > sent]
        for some in _parts(new, _LINES):
            metrics = [
                Metric(name, float(value), _milliseconds(line.at), line.step)
                for line in some
                for name, value in line.model_dump(exclude={"kind", "at", "step"}, exclude_none=True).items()
            ]
            self._client.log_batch(run.info.run_id, metrics, tags=[RunTag(_STEP, str(some[-1].step))])
        if record.result and "test_accuracy" not in run.data.metrics:
            at = _milliseconds(record.updated_at)
            found = {"test_accuracy": record.result.test_accuracy, "test_loss": record.result.test_loss}
            metrics = [Metric(name, value, at, record.step) for name, value in found.items()]
            self._client.log_batch(run.info.run_id, metrics)

    def _register(self, run: "Run", record: RunRecord) -> None:
        """The version that a run has published, whose source is its place in the store."""
        assert record.result
        name = self._prefix + record.dataset.name
        model = self._model(record.dataset.name)
        if model.tags.get(STORE) != self._store.url(""):
            raise TrackingError(
                f"the model {name!r} on the MLflow server is not of {self._store.url('')}, and is left alone: set "
                "NIGHTSHIFT_MLFLOW__PREFIX, so that yours has another name"
            )
        if not self._versions(name, record.run_id):
            self._client.create_model_version(
                name,
                source=self._store.url(record.result.model),
                run_id=run.info.run_id,
                tags={
                    RUN_ID: record.run_id,
                    "nightshift.snapshot": record.dataset.digest,
                    "nightshift.sha256": record.result.weights_sha256,
                },
                await_creation_for=0,
            )

    def _model(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(self._prefix + name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        tags = {STORE: self._store.url(""), NAME: name}
        return self._client.create_registered_model(self._prefix + name, tags)

    def _versions(self, model: str, run_id: str) -> list[Any]:
        found = self._all(
            self._client.search_model_versions, filter_string=f"name = '{model}' and tags.`{RUN_ID}` = '{run_id}'"
        )
        return found[:1]

    def _run(self, record: RunRecord) -> "Run | None":
        """The server's run, made if it is missing; None if somebody has deleted it there."""
        experiment = self._experiment(record.dataset.name)
        found = self._runs([experiment], f"tags.`{RUN_ID}` = '{record.run_id}'")
        active = [run for run in found if run.info.lifecycle_stage == "active"]
        if found and not active:
            return None
        for other in active[1:]:  # two processes made one at once
            self._client.delete_run(other.info.run_id)
        return (
            active[0]
            if active
            else self._client.create_run(
                experiment,
                _milliseconds(record.created_at),
                {RUN_ID: record.run_id, STORE: self._store.url("")},
                record.run_id,
            )
        )

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(self._prefix + name)
        if not found:
            return str(self._client.create_experiment(self._prefix + name, tags={"nightshift": "true"}))
        if "nightshift" not in found.tags:
            self._client.set_experiment_tag(found.experiment_id, "nightshift", "true")
        return str(found.experiment_id)

    def _runs(self, experiments: list[str], condition: str = "") -> list["Run"]:
        """This store's runs, deleted ones too, always in the same order."""
        from mlflow.entities import ViewType

        found = self._all(
            self._client.search_runs, experiment_ids=experiments, filter_string=condition, run_view_type=ViewType.ALL
        )
        ours = [run for run in found if run.data.tags.get(STORE) == self._store.url("")]
        return sorted(ours, key=lambda run: run.info.run_id)

    def _all(self, search: Any, **arguments: Any) -> list[Any]:
        """What is found, of all pages."""
        page = search(**arguments)
        found = list(page)
        while page.token:
            page = search(**arguments, page_token=page.token)
            found += page
        return found


def _parts(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def _milliseconds(moment: Any) -> int:
    return int(moment.timestamp() * 1000)

"""A verdict reaches the team's webhook, signed, and a bad webhook costs nothing but a warning."""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import SecretBytes, SecretStr

from nightshift.errors import TrackingError
from nightshift.judging.table import guards_table
from nightshift.progress import LogProgress, shown_by
from nightshift.records.run import read_record
from nightshift.refs import Verdict
from nightshift.settings import Settings, Webhook
from nightshift.storage.memory import MemoryStore
from nightshift.tracking import beside, webhook
from tests.commands import Finished
from tests.flows.test_verdicts import guard
from tests.hostile import HOSTILE
from tests.judging.test_gate import finish, promote, published
from tests.own_images import DATASET, write_images
from tests.test_docs import DOCS, blocks

KEY = b"a key of thirty-two bytes, or so"
PATH = "/hooks/T0P-SECRET"


@dataclass
class Receiver:
    """A server of the team's, which answers each POST with the next status, 204 when there is none left."""

    answers: list[int] = field(default_factory=list)
    got: list[tuple[str, dict[str, str], str]] = field(default_factory=list)
    url: str = ""

    def hook(self, key: bytes | None = KEY) -> Webhook:
        return Webhook(url=SecretStr(self.url + PATH), key=SecretBytes(key) if key else None)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    received = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            received.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(received.answers.pop(0) if received.answers else 204)
            self.send_header("Location", f"{received.url}/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            received.got.append((self.path, {}, ""))
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        received.url = f"http://127.0.0.1:{server.server_port}"
        yield received
        server.shutdown()


def test_the_signature_is_that_of_the_standard() -> None:
    """The test vector of Standard Webhooks' own libraries, with its secret."""
    settings = Settings(webhook="http://localhost/", webhook_secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert settings.hook
    assert settings.hook.key
    found = webhook.signature(
        settings.hook.key.get_secret_value(), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, '{"test": 2432232314}'
    )
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_message_has_the_verdict_with_its_table_and_nothing_in_it_is_obeyed() -> None:
    store = MemoryStore()
    model = published(store, 0.5, "monday")
    finish(store, model, promote(store, model))
    record, _ = read_record(store, "monday")
    for text in HOSTILE.values():
        guards = [guard("all images", 1), guard(text, -12.5, ok=False)]
        verdict = Verdict(promoted=False, reason=text, comparison=None, champion=None, guards=guards, guarded=7)
        found = webhook.message(store, record, model, verdict, guards_table(verdict))
        assert found.isprintable()
        body = json.loads(found)
        assert (body["format"], body["event"], body["run_id"], body["promoted"]) == (1, "verdict", "monday", False)
        assert body["report"] == store.url("reports/monday/report.html")
        assert body["snapshot"] == record.dataset.digest
        assert [(row["ok"], row["images"], row["difference"]) for row in body["guards"]] == [
            (True, 1234, 0.01),
            (False, 1234, -0.125),
        ]
        assert body["guarded"] == 7
        assert len(body["table"].splitlines()) == 4


def test_a_message_that_is_not_taken_is_sent_again_under_the_same_id_and_each_is_signed(receiver: Receiver) -> None:
    receiver.answers = [503, 429]
    webhook.deliver(receiver.hook(), '{"format": 1}')
    assert [path for path, _, _ in receiver.got] == [PATH] * 3
    assert len({headers["webhook-id"] for _, headers, _ in receiver.got}) == 1
    for _, headers, body in receiver.got:
        signed = webhook.signature(KEY, headers["webhook-id"], int(headers["webhook-timestamp"]), body)
        assert headers["webhook-signature"] == signed
    webhook.deliver(receiver.hook(key=None), '{"format": 1}')
    assert "webhook-signature" not in receiver.got[-1][1]


@pytest.mark.parametrize(("status", "says"), [(301, "redirect"), (404, "refuses"), (401, "refuses")])
def test_a_redirect_is_not_followed_and_a_refusal_not_repeated(receiver: Receiver, status: int, says: str) -> None:
    receiver.answers = [status]
    with pytest.raises(TrackingError, match=says) as refusal:
        webhook.deliver(receiver.hook(), "{}")
    assert len(receiver.got) == 1
    assert "SECRET" not in str(refusal.value)


def test_a_webhook_that_fails_costs_a_warning_and_its_address_is_nowhere(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    store = MemoryStore()
    model = published(store, 0.5, "monday")
    verdict = promote(store, model)
    finish(store, model, verdict)
    with caplog.at_level(logging.DEBUG), shown_by(LogProgress()):
        beside.send_verdict(store, receiver.hook(), model, verdict, [])
        receiver.answers = [404]
        beside.send_verdict(store, receiver.hook(), model, verdict, [])
    assert len(receiver.got) == 2
    assert "the verdict is not sent: the webhook at 127.0.0.1 refuses" in caplog.text
    shown = [caplog.text, *capfd.readouterr(), repr(receiver.hook()), str(Settings(webhook=receiver.url + PATH))]
    assert "SECRET" not in "".join(shown)
    assert KEY.decode() not in "".join(shown)


def test_a_webhook_that_never_answers_is_left_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_PATIENCE", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hook = Webhook(url=SecretStr(f"http://127.0.0.1:{silent.getsockname()[1]}/"))
        with pytest.raises(TrackingError, match="2 s"):
            beside.told(webhook.deliver, hook, "{}")


@pytest.mark.slow
def test_a_night_sends_its_verdict(
    receiver: Receiver, nightshift: Callable[..., Finished], tmp_path: Path, prefect_api: str
) -> None:
    write_images(tmp_path, range(90))
    (tmp_path / "nightshift.toml").write_text(DATASET)
    secret = KEY.decode()
    done = nightshift(
        *("train", "--recipe", "parts", "--run-id", "night", "--json"),
        PREFECT_API_URL=prefect_api,
        NIGHTSHIFT_WEBHOOK=receiver.url + PATH,
        NIGHTSHIFT_WEBHOOK_SECRET=secret,
    )
    assert done.exit_code == 0, done.err
    ((_, headers, body),) = receiver.got
    sent = json.loads(body)
    assert (sent["run_id"], sent["promoted"], sent["test_accuracy"]) == ("night", True, done.json["test_accuracy"])
    page: dict[str, Callable[..., bool]] = {}
    exec(blocks("python", (DOCS / "tools.md").read_text())[0], page)
    assert page["is_ours"](headers, body.encode(), secret)
    assert not page["is_ours"](headers, body.encode() + b" ", secret)
    assert "SECRET" not in done.err

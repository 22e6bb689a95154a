"""Settings: a mistake is refused with a message from which it can be corrected."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from pydantic import BaseModel

from nightshift.errors import SettingsError
from nightshift.settings import MlflowSettings, S3Settings, Settings


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without settings, in an empty directory."""
    for name in variables(Settings):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def variables(model: type[BaseModel], prefix: str = "NIGHTSHIFT_") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}".upper()
        if field.annotation is S3Settings:
            yield from variables(S3Settings, f"{prefix}{name}__")


def settings_refusal() -> str:
    with pytest.raises(SettingsError) as refusal:
        Settings.load()
    return str(refusal.value)


@pytest.mark.parametrize("model", [Settings, S3Settings, MlflowSettings])
def test_every_setting_says_what_it_is_for(model: type[BaseModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_an_endpoint_without_a_bucket_is_refused_with_the_variable_to_set(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NIGHTSHIFT_S3__ENDPOINT_URL", "http://localhost:9000")
    assert "NIGHTSHIFT_S3__BUCKET" in settings_refusal()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NIGHTSHIFT_LEASE_SECONDS", "abc"),
        ("NIGHTSHIFT_LEASE_SECONDS", "5"),
        ("NIGHTSHIFT_S3", "abc"),
        ("NIGHTSHIFT_LEASE_SECONDS", "nan"),
        ("NIGHTSHIFT_SAVE_RETRY_SECONDS", "inf"),
        ("NIGHTSHIFT_PRICE_PER_HOUR", "inf"),
        ("NIGHTSHIFT_MAX_RECOVERIES", "9" * 5000),
        ("NIGHTSHIFT_HOME", "~nosuchuser/x"),
        ("NIGHTSHIFT_NODES", "[1]"),
        ("NIGHTSHIFT_NODES", '{"count":' * 3000),
        ("NIGHTSHIFT_NODES__COUNT", "1:" + "9" * 5000),
        ("NIGHTSHIFT_NODES__RENDEZVOUS", "http://user:secret@host:5"),
        ("NIGHTSHIFT_MLFLOW__TRACKING_URI", "http://user:secret@host:5000"),
        ("NIGHTSHIFT_MLFLOW__TRACKING_URI", "https://host/?token=secret"),
        ("NIGHTSHIFT_MLFLOW__TRACKING_URI", "sqlite:///mlflow.db"),
        ("NIGHTSHIFT_MLFLOW__PREFIX", "'or"),
        ("NIGHTSHIFT_WEBHOOK", "http://example.com/secret"),
        ("NIGHTSHIFT_WEBHOOK", "https:///secret"),
        ("NIGHTSHIFT_WEBHOOK", "secret"),
        ("NIGHTSHIFT_WEBHOOK", "http://127.0.0.1.example.com/secret"),
        ("NIGHTSHIFT_WEBHOOK_SECRET", "whsec_secret but not base64"),
        ("NIGHTSHIFT_WEBHOOK_SECRET", "a short secret"),
        ("NIGHTSHIFT_S3__ENDPOINT_URL", "localhost:9000"),
        ("NIGHTSHIFT_S3__ENDPOINT_URL", "http://user:sec ret@localhost:9000"),
        ("NIGHTSHIFT_S3__TIMEOUT_SECONDS", "1e300"),
        ("NIGHTSHIFT_S3__REGION", ""),
        ("NIGHTSHIFT_S3__BUCKET", "ab"),
        ("NIGHTSHIFT_S3__BUCKET", "a/../b"),
        ("NIGHTSHIFT_S3__CHECKSUMS", "sometimes"),
        ("NIGHTSHIFT_S3__ALLOW_UNFENCED", "perhaps"),
    ],
)
def test_a_value_that_does_not_parse_is_refused_with_its_variable(
    environment: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    environment.setenv(variable, value)
    message = settings_refusal()
    assert f"{variable}:" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("NIGHTSHIFT_S3_BUCKET", "NIGHTSHIFT_S3__BUCKET"),
        ("NIGHTSHIFT_LEASE_SECOND", "NIGHTSHIFT_LEASE_SECONDS"),
    ],
)
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_an_unknown_variable_is_refused_with_the_nearest(
    environment: pytest.MonkeyPatch, place: str, wrong: str, right: str
) -> None:
    if place == ".env":
        Path(".env").write_text(f"{wrong}=5\n")
    else:
        environment.setenv(wrong, "5")
    message = settings_refusal()
    assert wrong in message
    assert f"Did you mean {right}?" in message


def test_variables_of_others_are_left_alone_in_the_environment_and_in_the_file(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("AWS_REGION", "eu-west-1")
    Path(".env").write_text("PREFECT_API_URL=http://localhost:4200/api\n")
    assert Settings.load().s3 == S3Settings()


def test_the_file_in_the_current_directory_is_read_and_the_environment_wins(environment: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("NIGHTSHIFT_LEASE_SECONDS=7\nNIGHTSHIFT_S3__BUCKET=team\nNIGHTSHIFT_S3__PREFIX=file\n")
    environment.setenv("NIGHTSHIFT_S3__PREFIX", "environment")
    settings = Settings.load()
    assert (settings.lease_seconds, settings.s3.bucket, settings.s3.prefix) == (7, "team", "environment")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("NIGHTSHIFT_HOME=caf\xe9".encode("latin-1"), ".env is not text in UTF-8"),
        (b"NIGHTSHIFT_HOME='a\0b'", "'NIGHTSHIFT_HOME' is nothing that an environment can hold"),
        (b"'a=b'=1", "'a=b' is nothing that an environment can hold"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_name(
    environment: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    Path(".env").write_bytes(content)
    assert reason in settings_refusal()


def test_a_home_behind_links_in_a_circle_is_refused(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    environment.setenv("NIGHTSHIFT_HOME", str(tmp_path / "one" / "home"))
    assert "NIGHTSHIFT_HOME:" in settings_refusal()


@pytest.mark.parametrize(
    "variables",
    [
        {"NIGHTSHIFT_S3__ENDPOINT_URL": "http://user:secret@["},
        {"NIGHTSHIFT_S3__ENDPOINT_URL": "http://user:secret@.."},
        {"NIGHTSHIFT_S3__REGION": "-"},
        {"AWS_PROFILE": "no-such-profile"},
    ],
)
def test_settings_of_which_no_client_can_be_made_are_refused_without_their_password(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    from nightshift.storage.s3 import S3

    environment.setenv("NIGHTSHIFT_S3__BUCKET", "team")
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(SettingsError, match="there is no way to the bucket") as refusal:
        S3(Settings.load().s3)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("home", [None, "here", "/there", "~/mine"])
def test_home_is_absolute_after_loading(environment: pytest.MonkeyPatch, tmp_path: Path, home: str | None) -> None:
    environment.setenv("HOME", str(tmp_path / "user"))
    if home:
        environment.setenv("NIGHTSHIFT_HOME", home)
    expected = {None: tmp_path / ".nightshift", "here": tmp_path / "here", "/there": Path("/there")}
    assert Settings.load().home == expected.get(home, tmp_path / "user" / "mine").resolve()


def test_the_embedded_server_is_used_if_and_only_if_no_bucket_is_named(environment: pytest.MonkeyPatch) -> None:
    assert Settings.load().s3.embedded
    environment.setenv("NIGHTSHIFT_S3__BUCKET", "team")
    assert not Settings.load().s3.embedded

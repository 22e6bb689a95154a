"""Settings say where things are; TrainConfig says what changes the result.

Settings come from the environment (`NIGHTSHIFT_…`) and `.env`. A TrainConfig comes from a recipe and
overrides, is stored in the run record, and two equal ones give the same bits.
"""

import base64
import binascii
import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretBytes,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnparsableError

from nightshift.errors import SettingsError
from nightshift.explain import near_miss, problem_of

_PREFIX = "NIGHTSHIFT_"
# Much more makes a socket, a lock or a date raise, in the middle of the night.
_A_DAY, _A_WEEK, _OFTEN = 86_400, 604_800, 10_000
_SECRET_LENGTH = 32
_ENCODED = "whsec_"


class S3Settings(BaseModel):
    """Which bucket to use. With neither bucket nor endpoint, the embedded server is used."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    endpoint_url: str | None = Field(
        None, pattern=r"^https?://\S+$", description="An S3-compatible endpoint; none for AWS."
    )
    bucket: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{3,63}$", description="The bucket, which must exist.")
    prefix: str = Field(
        "", pattern=r"^([^/].*)?$", description="Put before every key, for a bucket shared with others."
    )
    region: str = Field("us-east-1", pattern=r"^[A-Za-z0-9-]{1,63}$", description="The bucket's region.")
    timeout_seconds: float = Field(
        60, gt=0, le=_A_DAY, description="How long to wait for an answer before asking again."
    )
    checksums: Literal["when_supported", "when_required"] = Field(
        "when_supported", description="`when_required` for a store that refuses checksum trailers."
    )
    allow_unfenced: bool = Field(False, description="Accept a store without conditional writes: no fencing then.")

    @model_validator(mode="after")
    def _endpoint_needs_bucket(self) -> Self:
        if self.endpoint_url and not self.bucket:
            raise ValueError(f"an endpoint needs a bucket: set {_PREFIX}S3__BUCKET too")
        return self

    @property
    def embedded(self) -> bool:
        return self.bucket is None


class NodesSettings(BaseModel):
    """The machines that train a run together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    count: str = Field(
        "1", pattern=r"^[1-9][0-9]{0,4}(:[1-9][0-9]{0,4})?$", description="How many machines there are, N or MIN:MAX."
    )
    rendezvous: str | None = Field(
        None,
        pattern=r"^[^:\s]+:[0-9]{1,5}$",
        description="HOST:PORT where all meet, free on the machine that runs the flow.",
    )
    wait_seconds: int = Field(
        600, ge=1, le=_A_WEEK, description="How long to wait for other machines to come, or to come back."
    )
    max_restarts: int = Field(
        10, ge=0, le=_OFTEN, description="How many times a run's processes are restarted in place."
    )
    secret: SecretStr | None = Field(None, description="What the machines know and nobody else, for several machines.")

    @model_validator(mode="after")
    def _several_need_a_rendezvous_and_a_secret(self) -> Self:
        if not self.alone and not self.rendezvous:
            raise ValueError(f"several machines need a place to meet: set {_PREFIX}NODES__RENDEZVOUS too")
        if not self.alone and len(self.secret or ()) < _SECRET_LENGTH:
            raise ValueError(
                f"several machines need a secret of at least {_SECRET_LENGTH} characters: set {_PREFIX}NODES__SECRET "
                "too, on all machines to what `openssl rand -hex 32` has printed on one"
            )
        if self.fewest > self.most:
            raise ValueError(f"{_PREFIX}NODES__COUNT is MIN:MAX, the smaller number first")
        if self.rendezvous and not 0 < int(self.rendezvous.rpartition(":")[2]) < 65_536:
            raise ValueError(f"{_PREFIX}NODES__RENDEZVOUS is HOST:PORT, the port from 1 to 65535")
        return self

    @property
    def fewest(self) -> int:
        return int(self.count.partition(":")[0])

    @property
    def most(self) -> int:
        return int(self.count.rpartition(":")[2])

    @property
    def alone(self) -> bool:
        return self.most == 1


class GateSettings(BaseModel):
    """What a candidate must reach to become the champion."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_accuracy: float = Field(0.0, ge=0, le=1, description="Below this test accuracy nothing is promoted.")
    max_regression: float = Field(
        0.0, ge=0, le=1, description="How far the test accuracy may lie below the champion's, as a share of 1."
    )
    max_slide: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How far it may lie below the best champion of the last thirty nights, or since the last change by "
        "hand; none: max_regression.",
    )
    max_class_regression: float = Field(
        0.05, ge=0, le=1, description="How far it may lie below the champion's on a class or slice, beyond chance."
    )
    min_class_images: int = Field(30, ge=1, description="A class or slice with fewer test images has no guard.")
    slices: str = Field(
        "", max_length=1000, description="Columns of your own table whose values are guarded, with commas between."
    )
    require_significance: bool = Field(
        False, description="Promote only what McNemar's test finds better than the champion."
    )
    fail_when_rejected: bool = Field(False, description="End the flow run Failed, not Completed, on a rejection.")

    @property
    def class_regression(self) -> float:
        """How much a part may lose: as much as the whole may, at least."""
        return max(self.max_class_regression, self.max_regression)

    @property
    def slice_columns(self) -> list[str]:
        return [name for name in map(str.strip, self.slices.split(",")) if name]


class KeepSettings(BaseModel):
    """For how long `gc` keeps what grows with the nights. What is not set keeps all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nights: int | None = Field(
        None, ge=1, le=_OFTEN, description="Runs that ended earlier go, with report and version; so do sweeps."
    )
    models: int | None = Field(
        None, ge=1, le=_OFTEN, description="Of each data set only so many finished runs stay, the newest."
    )
    snapshots: int | None = Field(
        None, ge=1, le=_OFTEN, description="Of each data set only so many snapshots stay, beside those of stored runs."
    )


class CacheSettings(BaseModel):
    """What this machine keeps of what it can fetch again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gigabytes: float = Field(
        100, ge=0, le=1e6, description="Of shards of encoded images; the least recently used go first."
    )


class MlflowSettings(BaseModel):
    """The team's MLflow server, which runs and models are reported to. Credentials go into MLflow's own variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tracking_uri: str | None = Field(None, description="The address of an MLflow server that is told of each run.")
    prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_ -]{0,60}$",
        description="Put before the names of experiments and models, for a server shared with others.",
    )

    @field_validator("tracking_uri")
    @classmethod
    def _is_a_server(cls, uri: str | None) -> str | None:
        if uri is not None and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", uri):
            raise ValueError(
                "should be http://HOST:PORT or https://HOST. User and password go into MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or a token into MLFLOW_TRACKING_TOKEN"
            )
        return uri


class Webhook(BaseModel):
    """Who is told of each verdict, and the key by which the message is signed. Both are shown as stars."""

    model_config = ConfigDict(frozen=True)

    url: SecretStr
    key: SecretBytes | None = None


class Settings(BaseSettings):
    """Where things are on this machine. Only `flows/`, the command line and `plugins` construct it."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", env_file=".env", extra="ignore", frozen=True, allow_inf_nan=False
    )

    home: Path = Field(Path(".nightshift"), description="Local cache, embedded S3 and Prefect server.")
    s3: S3Settings = Field(S3Settings(), description="The bucket; none for the embedded server.")
    # The holder stops a sixth of the lease before its end. That must exceed one second, the resolution of store clocks.
    lease_seconds: float = Field(
        60, ge=6, le=_A_DAY, description="A run may be taken over after its trainer was silent for so long."
    )
    save_retry_seconds: float = Field(
        120, ge=0, le=_A_WEEK, description="How long a failing save is retried before training goes on without it."
    )
    nodes: NodesSettings = Field(NodesSettings(), description="The machines that train a run together.")
    gate: GateSettings = Field(GateSettings(), description="What a candidate must reach to become the champion.")
    keep: KeepSettings = Field(KeepSettings(), description="What `gc` deletes of finished nights.")
    cache: CacheSettings = Field(CacheSettings(), description="What this machine keeps of images.")
    project: Path = Field(Path("nightshift.toml"), description="The project file: data sets, recipes and deployments.")
    dask: str | None = Field(
        None,
        pattern=r"^(tcp|tls)://[^:\s]+:[0-9]{1,5}$",
        description="The scheduler of a Dask cluster that reads the images of snapshots; none: this machine does.",
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="What an hour of a machine costs, for report and budget."
    )
    notify: str | None = Field(
        None,
        pattern=r"^[\w-]+/[\w-]+$",
        description="A notification block of the Prefect server, TYPE/NAME, that reports failed and rejected runs.",
    )
    webhook: SecretStr | None = Field(
        None, description="An address to which each verdict is sent as JSON; whoever knows it may send there too."
    )
    webhook_secret: SecretStr | None = Field(
        None,
        min_length=24,
        max_length=1000,
        description="What these messages are signed with (HMAC, Standard Webhooks).",
    )
    mlflow: MlflowSettings = Field(MlflowSettings(), description="The MLflow server that is told of runs and models.")
    max_recoveries: int = Field(
        20, ge=0, le=_OFTEN, description="How many times an interrupted run is restarted automatically."
    )

    @field_validator("webhook")
    @classmethod
    def _goes_over_tls(cls, address: SecretStr | None) -> SecretStr | None:
        if address and not _is_safe_place(address.get_secret_value()):
            raise ValueError("should be https://HOST/…; http:// goes to this machine only")
        return address

    @field_validator("webhook_secret")
    @classmethod
    def _can_be_decoded(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret:
            _key(secret.get_secret_value())
        return secret

    @property
    def hook(self) -> Webhook | None:
        """Where verdicts are sent; None: nowhere."""
        if not self.webhook:
            return None
        key = SecretBytes(_key(self.webhook_secret.get_secret_value())) if self.webhook_secret else None
        return Webhook(url=self.webhook, key=key)

    @classmethod
    def load(cls) -> Self:
        """Read the environment.

        Raises:
            SettingsError: a variable does not parse, or is not one of ours.
        """
        known, given = set(_variables(cls)), {name.upper(): name for name in (*os.environ, *_in_file())}
        for name in sorted(given.keys() - known):
            if name.startswith(_PREFIX):
                raise SettingsError(f"{given[name]} is not a setting of nightshift.{near_miss(name, sorted(known))}")
        try:
            settings = cls()
        except (UnparsableError, RecursionError):
            whole = [name for name in _wholes(cls) if name in given]
            raise SettingsError(
                f"{' or '.join(whole)}: not a JSON object; set single values instead, such as {_PREFIX}S3__BUCKET"
            ) from None
        except ValidationError as error:
            problems = "; ".join(
                f"{_PREFIX}{'__'.join(str(part) for part in detail['loc']).upper()}: {problem_of(detail)}"
                for detail in error.errors()
            )
            raise SettingsError(f"{problems}. Correct it in the environment or in .env.") from None
        try:
            home = settings.home.expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # nobody's ~name, links in a circle, a name too long
            raise SettingsError(
                f"{_PREFIX}HOME: {str(settings.home)!r} is no directory that can be found ({error}): set it to another"
            ) from None
        return settings.model_copy(update={"home": home})


def _is_safe_place(address: str) -> bool:
    """Whether what is sent there is encrypted, or stays on this machine."""
    try:
        url = urlsplit(address)
        host, _ = url.hostname, url.port
    except ValueError:
        return False
    if not host or not address.isprintable():
        return False
    if url.scheme == "https" or host == "localhost":
        return url.scheme in ("http", "https")
    try:
        return url.scheme == "http" and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(secret: str) -> bytes:
    """The bytes of a secret; of one that begins with whsec_, what the rest says in base64."""
    if not secret.startswith(_ENCODED):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_ENCODED), validate=True)
    except binascii.Error:
        raise ValueError(f"begins with {_ENCODED}, but what follows is no base64") from None


def _in_file() -> dict[str, str | None]:
    """The variables of `.env`; none if there is no such file."""
    try:
        found = dotenv_values(".env")
    except UnicodeDecodeError:
        raise SettingsError(".env is not text in UTF-8: save it as such, or set the variables elsewhere") from None
    except OSError as error:
        raise SettingsError(f".env cannot be read ({error.strerror}): mend it or take it away") from None
    for name, value in found.items():
        if not name or "=" in name or "\0" in f"{name}{value}":
            raise SettingsError(f".env: {name!r} is nothing that an environment can hold: correct or delete its line")
    return found


def _wholes(model: type[BaseModel]) -> list[str]:
    """The variables that would hold several settings as one JSON object."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return [
        _PREFIX + name.upper() for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]


def _variables(model: type[BaseModel], prefix: str = _PREFIX) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name.upper()}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, f"{prefix}{name.upper()}__")

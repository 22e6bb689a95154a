"""Settings say where things are; TrainConfig says what changes the result.

Settings come from the environment (`NIGHTSHIFT_…`) and `.env`. A TrainConfig comes from a recipe and
overrides, is stored in the run record, and two equal ones give the same bits.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnparsableError

from nightshift.errors import ConfigError, SettingsError

_PREFIX = "NIGHTSHIFT_"


class S3Settings(BaseModel):
    """Which bucket to use. With neither bucket nor endpoint, the embedded server is used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = Field(
        None, pattern=r"^https?://", description="An S3-compatible endpoint; none for AWS."
    )
    bucket: str | None = Field(None, min_length=3, max_length=63, description="The bucket, which must exist.")
    prefix: str = Field(
        "", pattern=r"^([^/].*)?$", description="Put before every key, for a bucket with other tenants."
    )
    region: str = Field("us-east-1", description="The bucket's region.")
    timeout_seconds: float = Field(60, gt=0, description="How long to wait for an answer before asking again.")
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

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: str = Field("1", pattern=r"^[1-9]\d*(:[1-9]\d*)?$", description="How many there are, N or MIN:MAX.")
    rendezvous: str | None = Field(
        None, pattern=r"^[^:]+:\d+$", description="HOST:PORT, free on the machine that runs the flow, where all meet."
    )
    wait_seconds: int = Field(600, ge=1, description="How long to wait for the others to come, or to come back.")
    max_restarts: int = Field(10, ge=0, description="How often the processes of a run are started again in place.")

    @model_validator(mode="after")
    def _several_need_a_rendezvous(self) -> Self:
        if not self.alone and not self.rendezvous:
            raise ValueError(f"several machines need a place to meet: set {_PREFIX}NODES__RENDEZVOUS too")
        if self.fewest > self.most:
            raise ValueError(f"{_PREFIX}NODES__COUNT is MIN:MAX, the smaller number first")
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

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_accuracy: float = Field(0.0, ge=0, le=1, description="Below this test accuracy nothing is promoted.")
    max_regression: float = Field(
        0.0, ge=0, le=1, description="How far the test accuracy may lie below the champion's, as a share of 1."
    )
    require_significance: bool = Field(
        False, description="Promote only what McNemar's test finds better than the champion."
    )
    fail_when_rejected: bool = Field(False, description="End the flow run Failed, not Completed, on a rejection.")


class Settings(BaseSettings):
    """Where things are on this machine. Only `flows/` and the command line construct it."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", env_file=".env", extra="ignore", frozen=True
    )

    home: Path = Field(Path(".nightshift"), description="Local cache, embedded S3 and Prefect server.")
    s3: S3Settings = Field(S3Settings(), description="The bucket; none for the embedded server.")
    # Its holder stops a sixth before its end: that must be more than the second to which a store tells the time.
    lease_seconds: float = Field(60, ge=6, le=86_400, description="A run may be taken over after such a silence.")
    save_retry_seconds: float = Field(
        120, ge=0, description="How long a failing save is tried again before training goes on without it."
    )
    nodes: NodesSettings = Field(NodesSettings(), description="The machines that train a run together.")
    gate: GateSettings = Field(GateSettings(), description="What a candidate must reach to become the champion.")
    price_per_hour: float | None = Field(None, ge=0, description="What an hour of training costs, for the report.")
    notify: str | None = Field(
        None,
        pattern=r"^[\w-]+/[\w-]+$",
        description="A notification block of the Prefect server, TYPE/NAME, to be told of failed and rejected runs.",
    )
    max_recoveries: int = Field(20, ge=0, description="How often an interrupted run is started again by itself.")

    @classmethod
    def load(cls) -> Self:
        """Read the environment.

        Raises:
            SettingsError: a variable does not parse or is none of ours.
        """
        known = set(_variables(cls))
        for name in (*os.environ, *dotenv_values(".env")):
            if name.upper().startswith(_PREFIX) and name.upper() not in known:
                raise SettingsError(f"{name} is not a setting of nightshift.{_near_miss(name, sorted(known))}")
        try:
            settings = cls()
        except UnparsableError:
            raise SettingsError(
                f"{_PREFIX}S3: not a JSON object; set {_PREFIX}S3__BUCKET and its like instead"
            ) from None
        except ValidationError as error:
            problems = "; ".join(
                f"{_PREFIX}{'__'.join(str(part) for part in detail['loc']).upper()}: {_explain(detail)}"
                for detail in error.errors()
            )
            raise SettingsError(f"{problems}. Correct it in the environment or in .env.") from None
        return settings.model_copy(update={"home": settings.home.expanduser().resolve()})


def _variables(model: type[BaseModel], prefix: str = _PREFIX) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name.upper()}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, f"{prefix}{name.upper()}__")


class TrainConfig(BaseModel):
    """Everything that decides which bits a run ends with, and how often it is saved on the way."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: str = Field(description="The recipe this started from.")
    model: str = Field(description="The architecture: one of `models.known_models()`.")
    dataset: str = Field("cifar10", description="The data set: one of `datasets.SPECS`.")
    max_train_images: int | None = Field(None, ge=1, description="Train on the first so many images only.")
    epochs: int = Field(ge=1, le=10_000, description="Passes over the training images.")
    batch_size: int = Field(ge=1, le=65_536, description="Images a step, over all ranks together.")
    drop_last: bool = Field(False, description="Leave out an epoch's last, smaller batch.")
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = Field(
        description="sgd is SGD with Nesterov momentum; muon is Muon for filters, and SGD for all else."
    )
    lr: float = Field(gt=0, le=100, description="The highest learning rate of the schedule.")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's and Muon's momentum; Adam's first beta.")
    weight_decay: float = Field(
        0.0, ge=0, le=10, description="L2 in SGD and Adam, decoupled in AdamW; in Muon for all but filters."
    )
    schedule: Literal["constant", "triangular", "one_cycle", "cosine", "linear"] = Field(
        "constant", description="The learning rate as a function of the step."
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Test and publish a moving average of the weights, which keeps this share a step."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    flip: Literal["off", "random", "alternating"] = Field(
        "off", description="Mirror training images: each with probability one half, or every second epoch."
    )
    translate: int = Field(0, ge=0, le=16, description="Shift by up to so many pixels, edges reflected.")
    normalization: Literal["dataset", "half"] = Field(
        "dataset", description="By the data set's own mean and deviation, or by 0.5 and 0.5."
    )
    tta: Literal["off", "flip", "crops"] = Field(
        "off", description="Test on the mean of each image and its mirror; crops: also of both shifted by a pixel."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the initial weights, the order and the augmentation.")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="Save at every so many steps.")
    checkpoint_every_seconds: float | None = Field(30.0, gt=0, description="Save at the step edge after so long.")
    keep_last: int = Field(3, ge=1, description="How many of a run's newest checkpoints are kept.")
    keep_best: bool = Field(True, description="Keep also the one after the epoch of the lowest training loss.")
    keep_every_epochs: int | None = Field(None, ge=1, description="Keep also the first after every so many epochs.")
    deterministic: bool = Field(True, description="Refuse operations whose result varies from run to run.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one.")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="bfloat16: autocast in forward; auto: where the hardware has it."
    )
    compile: Literal["off", "on", "auto"] = Field(
        "off", description="torch.compile the model; auto: on a GPU, where a training is long enough to repay it."
    )
    tensorboard: bool = Field(False, description="Write TensorBoard event files under NIGHTSHIFT_HOME.")
    nproc_per_node: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        1, description="Processes a machine that share each batch; auto: one a GPU."
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate values of any origin.

        Raises:
            ConfigError: naming each bad field, its value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_config_problem(detail, sorted(cls.model_fields)) for detail in error.errors()]
            raise ConfigError("\n".join(problems)) from None

    def override(self, overrides: Mapping[str, Any]) -> Self:
        """This config with some fields replaced; text is parsed as the field's type.

        Raises:
            ConfigError: as `parse`.
        """
        texts = {name: None if value in ("none", "null", "None") else value for name, value in overrides.items()}
        return self.parse({**self.model_dump(), **texts})

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the result, without those that only say how often or where."""
        return self.model_dump(exclude=set(_WITHOUT_EFFECT_ON_BITS))

    @property
    def digest(self) -> str:
        """sha256, hexadecimal, of the fields that decide the result."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()


# A device decides bits too, but a run may move; it is in the record's environment, and a change is warned of.
_WITHOUT_EFFECT_ON_BITS = (
    "recipe",
    "checkpoint_every_steps",
    "checkpoint_every_seconds",
    "keep_last",
    "keep_best",
    "keep_every_epochs",
    "tta",
    "tensorboard",
    "device",
    "nproc_per_node",
)


def _config_problem(detail: ErrorDetails, fields: list[str]) -> str:
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"there is no field {name!r}.{_near_miss(name, fields)} The fields are: {', '.join(fields)}"
    if detail["type"] == "missing":
        return f"{name} is missing"
    return f"{name}={detail['input']!r} is not valid: {_explain(detail)}"


def _explain(detail: ErrorDetails) -> str:
    allowed = detail.get("ctx", {}).get("expected")
    if detail["type"] == "literal_error":
        return f"allowed are {allowed}"
    message = detail["msg"]
    return message.removeprefix("Value error, ").removeprefix("Input ")


def _near_miss(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""

"""DOC."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from nightshift.errors import ConfigError
from nightshift.explain import _explain, _near_miss


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

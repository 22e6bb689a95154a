"""The sections of a config, and which of their fields decide the bits that a run ends with."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from nightshift.errors import ConfigError


@dataclass(frozen=True)
class _Effect:
    """Whether a field decides which bits a run ends with."""

    on_bits: bool


Value = TypeVar("Value")
Decisive = Annotated[Value, _Effect(on_bits=True)]
"""A stored run resumes only with the same value. A new field's default has to do what was done before it existed."""
Free = Annotated[Value, _Effect(on_bits=False)]
"""May change when a run is resumed."""


class Section(BaseModel):
    """Some fields that belong together. One with a field `name` may be given as that name alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) and "name" in cls.model_fields else value


class ModelConfig(Section):
    """The network."""

    name: Decisive[str] = Field(description="The architecture: one of `models.names`.")


class DataConfig(Section):
    """The training images, and how they come to the network."""

    dataset: Decisive[str] = Field("cifar10", description="The data set: one of `data.specs.SPECS`.")
    max_train_images: Decisive[int | None] = Field(None, ge=1, description="Train on the first so many images only.")
    batch_size: Decisive[int] = Field(ge=1, le=65_536, description="Images a step, over all ranks together.")
    drop_last: Decisive[bool] = Field(False, description="Leave out an epoch's last, smaller batch.")
    sampling: Decisive[Literal["shuffled", "balanced"]] = Field(
        "shuffled", description="An epoch shows each image once; balanced: as many images, of each class equally many."
    )
    normalization: Decisive[Literal["dataset", "half", "network"]] = Field(
        "dataset", description="By the data set's mean and deviation, by 0.5 and 0.5, or as the network's author did."
    )


class StartConfig(Section):
    """The weights that a run begins with."""

    name: Decisive[Literal["scratch", "pretrained", "champion", "shrink"]] = Field(
        "scratch", description="Random ones, those of a file, the champion's, or the champion's shrunk and perturbed."
    )
    weights: Decisive[str | None] = Field(
        None, min_length=1, description="Of pretrained: a file, s3://BUCKET/KEY, or hub, where the library has them."
    )
    names: Decisive[str] = Field(
        "same",
        pattern=r"^(same|order|[^=,]*=[^=,]*(,[^=,]*=[^=,]*)*)$",
        description="How tensors in the file are called: same, order (as they follow each other), or OLD=NEW,… for "
        "what names begin with.",
    )
    shrink: Decisive[float] = Field(0.6, gt=0, le=1, description="Of shrink: what the champion's weights are times.")
    perturb: Decisive[float] = Field(0.01, ge=0, le=1, description="Of shrink: the share of random weights added.")
    scratch_every: Decisive[int | None] = Field(
        None, ge=2, description="Every so many nights of a data set, one begins from scratch, to compare with."
    )


class OptimizerConfig(Section):
    """How gradients become weights."""

    name: Decisive[Literal["sgd", "adam", "adamw", "muon"]] = Field(
        description="sgd is SGD with Nesterov momentum; muon is Muon for filters, and SGD for all else."
    )
    lr: Decisive[float] = Field(gt=0, le=100, description="The highest learning rate of the schedule.")
    momentum: Decisive[float] = Field(0.9, ge=0, lt=1, description="SGD's and Muon's momentum; Adam's first beta.")
    weight_decay: Decisive[float] = Field(
        0.0, ge=0, le=10, description="L2 in SGD and Adam, decoupled in AdamW; in Muon for all but filters."
    )
    ema_decay: Decisive[float] = Field(
        0.0, ge=0, lt=1, description="Test and publish a moving average of the weights, which keeps this share a step."
    )
    clip_norm: Decisive[float | None] = Field(
        None, gt=0, description="Scale all gradients down together where their norm is greater."
    )
    accumulate: Decisive[int] = Field(
        1, ge=1, le=1024, description="Compute a batch in so many parts, which takes less memory."
    )
    layer_decay: Decisive[float] = Field(
        1.0, gt=0, le=1, description="The first layer's rate as a share of the last one's. Those between lie between."
    )


class ScheduleConfig(Section):
    """How long to train, and the learning rate on the way."""

    name: Decisive[Literal["constant", "triangular", "one_cycle", "cosine", "linear"]] = Field(
        "constant", description="The learning rate as a function of the step."
    )
    epochs: Decisive[int] = Field(ge=1, le=10_000, description="Passes over the training images.")
    warmup: Decisive[float] = Field(0.0, ge=0, lt=1, description="The rate rises from 0 over this share of the steps.")
    frozen_epochs: Decisive[int] = Field(0, ge=0, description="In the first so many epochs only the head is trained.")


class AugmentConfig(Section):
    """How a training image differs each time it is seen."""

    flip: Decisive[Literal["off", "random", "alternating"]] = Field(
        "off", description="Mirror training images: each with probability one half, or every second epoch."
    )
    translate: Decisive[int] = Field(0, ge=0, le=16, description="Shift by up to so many pixels, edges reflected.")
    crop: Decisive[float] = Field(
        1.0, gt=0, le=1, description="Enlarge a random part, of at least this share of the area; 1: off."
    )
    randaugment: Decisive[int] = Field(
        0, ge=0, le=30, description="Two random operations of RandAugment, of this magnitude; 0: off."
    )
    trivialaugment: Decisive[bool] = Field(
        False, description="One random operation of TrivialAugment, of a random magnitude."
    )
    jitter: Decisive[float] = Field(
        0.0, ge=0, le=1, description="Change brightness, contrast and saturation by a factor of up to 1 ± this."
    )
    hue: Decisive[float] = Field(0.0, ge=0, le=0.5, description="Turn the hue by up to this share of the circle.")
    erasing: Decisive[float] = Field(
        0.0, ge=0, le=1, description="Cover a random rectangle with the mean colour, with this probability."
    )
    transform: Decisive[str | None] = Field(
        None, min_length=1, description="Change each image by code of your own, named PACKAGE.MODULE:NAME."
    )
    mixup: Decisive[float] = Field(
        0.0, ge=0, le=10, description="Blend images and their labels; alpha of the Beta distribution; 0: off."
    )
    cutmix: Decisive[float] = Field(
        0.0, ge=0, le=10, description="Put a part of one image into another; alpha, as mixup. With both: one a batch."
    )

    @property
    def per_image(self) -> bool:
        """Whether each image is changed by itself, besides flips and shifts."""
        of_torchvision = self.randaugment or self.trivialaugment or self.jitter or self.hue or self.erasing
        return bool(self.crop < 1 or of_torchvision or self.transform)

    @property
    def mixes(self) -> bool:
        """Whether a training image is one of two, and its target two classes."""
        return bool(self.mixup or self.cutmix)


LOSSES = ("cross_entropy", "focal", "binary")
"""The losses that need no plug-in."""


class LossConfig(Section):
    """What training makes small."""

    name: Decisive[str] = Field(
        "cross_entropy",
        min_length=1,
        description="cross_entropy; focal: hard images count more; binary: sigmoid, for two classes; or your own, as "
        "PACKAGE.MODULE:NAME.",
    )
    label_smoothing: Decisive[float] = Field(
        0.0, ge=0, lt=1, description="Share of the target spread over all classes."
    )
    class_weights: Decisive[Literal["off", "balanced"]] = Field(
        "off", description="balanced: an image counts as its class is rare among the training images."
    )
    gamma: Decisive[float] = Field(
        2.0,
        ge=0,
        le=10,
        description="How little focal counts images that are already classified well; 0: as any other.",
    )


class EvaluationConfig(Section):
    """How the model is tested at the end, and what the validation images decide on the way there."""

    tta: Free[Literal["off", "flip", "crops"]] = Field(
        "off", description="Test on the mean of each image and its mirror; crops: also of both shifted by a pixel."
    )
    validate_every: Decisive[int | None] = Field(
        None, ge=1, description="Look how good the model is on the validation images after every so many epochs."
    )
    metric: Decisive[Literal["accuracy", "loss"]] = Field(
        "accuracy", description="By what an epoch is the best on the validation images."
    )
    keep: Decisive[Literal["last", "best"]] = Field(
        "last", description="Test and publish the weights after the last epoch, or after the best one."
    )
    patience: Decisive[int | None] = Field(
        None, ge=1, description="Stop once so many validations in a row have found no better epoch."
    )


class SavingConfig(Section):
    """When checkpoints are written, and which are kept."""

    checkpoint_every_steps: Free[int | None] = Field(None, ge=1, description="Save at every so many steps.")
    checkpoint_every_seconds: Free[float | None] = Field(
        30.0, gt=0, description="Save at the step boundary after so many seconds."
    )
    keep_last: Free[int] = Field(3, ge=1, description="How many of a run's newest checkpoints are kept.")
    keep_best: Free[bool] = Field(True, description="Keep also the one after the epoch of the lowest training loss.")
    keep_every_epochs: Free[int | None] = Field(
        None, ge=1, description="Keep also the first after every so many epochs."
    )


class BudgetConfig(Section):
    """When the verdict has to be there. Training ends early enough for it, whatever steps are left."""

    finish_by: Free[str | None] = Field(
        None, description="By this time of day, such as 06:30; in a stored config, the date and the zone as well."
    )
    max_hours: Free[float | None] = Field(
        None, gt=0, le=10_000, description="After so many hours; those between two attempts do not count."
    )
    max_cost: Free[float | None] = Field(
        None, gt=0, description="Before these hours have cost more, by NIGHTSHIFT_PRICE_PER_HOUR."
    )

    @field_validator("finish_by", mode="before")
    @classmethod
    def _is_a_time(cls, value: Any) -> Any:
        text = f"{value:%H:%M}" if isinstance(value, time) else value  # TOML has times of its own
        if isinstance(text, str) and not _TIME_OF_DAY.fullmatch(text):
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                moment = None
            if not moment or not moment.tzinfo or not 2000 <= moment.year < 3000:
                raise ValueError("should be a time of day such as 06:30, or a moment such as 2026-11-27T06:30+01:00")
        return text

    @property
    def finish_at(self) -> datetime | None:
        """The moment of `finish_by`, in UTC; None where it is not set, or only a time of day."""
        if self.finish_by is None or _TIME_OF_DAY.fullmatch(self.finish_by):
            return None
        return datetime.fromisoformat(self.finish_by).astimezone(UTC)

    def begun_at(self, start: datetime) -> Self:
        """With a time of day in `finish_by` as a moment: the first after `start` when clocks show it.

        Args:
            start: in the zone whose clocks are meant; without a zone, in that of this machine.
        """
        if self.finish_by is None or self.finish_at:
            return self
        hour, minute = map(int, self.finish_by.split(":"))
        days = (
            (start + timedelta(days=more)).replace(hour=hour, minute=minute, second=0, microsecond=0) for more in (0, 1)
        )
        moment = next(day for day in days if day.astimezone(UTC) > start.astimezone(UTC))
        shown = moment if moment.tzinfo else moment.astimezone()
        return self.model_copy(update={"finish_by": shown.isoformat(timespec="minutes")})

    def hours(self, price_per_hour: float | None) -> dict[str, float]:
        """What limits the hours, each by its field as people see it.

        Raises:
            ConfigError: nobody has said what an hour costs.
        """
        found = {} if self.max_hours is None else {f"budget.max_hours={self.max_hours:g}": self.max_hours}
        if self.max_cost is not None:
            if price_per_hour is None:
                raise ConfigError(
                    f"budget.max_cost={self.max_cost:g} needs to know what an hour costs: set NIGHTSHIFT_PRICE_PER_HOUR"
                )
            if price_per_hour:
                found[f"budget.max_cost={self.max_cost:g}"] = self.max_cost / price_per_hour
        return found


_TIME_OF_DAY = re.compile(r"([01]?\d|2[0-3]):[0-5]\d")


class HardwareConfig(Section):
    """What computes, and how exactly. A device decides bits too, but a run may move: the record says where it ran."""

    device: Free[Literal["auto", "cpu", "cuda"]] = Field("auto", description="auto: a GPU if there is one.")
    nproc_per_node: Free[Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]] = Field(
        1, description="Processes a machine that share each batch; auto: one a GPU."
    )
    loader_threads: Free[Annotated[int, Field(ge=1, le=256)] | Literal["auto"]] = Field(
        "auto", description="Threads that decode a process' encoded images; auto: the cores, shared by the processes."
    )
    precision: Decisive[Literal["float32", "bfloat16", "auto"]] = Field(
        "float32", description="bfloat16: autocast in forward; auto: where the hardware has it."
    )
    compile: Decisive[Literal["off", "on", "auto"]] = Field(
        "off", description="torch.compile the model; auto: on a GPU, where a training is long enough to repay it."
    )
    deterministic: Decisive[bool] = Field(True, description="Refuse operations whose result varies from run to run.")


class PublishConfig(Section):
    """What is published beside the weights."""

    triton: Free[bool] = Field(
        False, description="Publish model.onnx too, and serve the champion from triton/, a model repository for Triton."
    )


class TrackingConfig(Section):
    """Who else is to see the course of a training."""

    tensorboard: Free[bool] = Field(False, description="Write TensorBoard event files under NIGHTSHIFT_HOME.")


def is_decisive(field: FieldInfo) -> bool:
    """Whether a field decides which bits a run ends with."""
    (effect,) = (mark for mark in field.metadata if isinstance(mark, _Effect))
    return effect.on_bits

"""TrainConfig: everything that decides which bits a run ends with, and how often it is saved on the way."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nightshift.config.formats import of_newest_format
from nightshift.errors import ConfigError
from nightshift.explain import near_miss, problem_of


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
    mixup: Decisive[float] = Field(
        0.0, ge=0, le=10, description="Blend images and their labels; alpha of the Beta distribution; 0: off."
    )
    cutmix: Decisive[float] = Field(
        0.0, ge=0, le=10, description="Put a part of one image into another; alpha, as mixup. With both: one a batch."
    )

    @property
    def per_image(self) -> bool:
        """Whether torchvision's transforms change each image, besides flips and shifts."""
        return bool(self.crop < 1 or self.randaugment or self.trivialaugment or self.jitter or self.hue or self.erasing)

    @property
    def mixes(self) -> bool:
        """Whether a training image is one of two, and its target two classes."""
        return bool(self.mixup or self.cutmix)


class LossConfig(Section):
    """What training makes small."""

    name: Decisive[Literal["cross_entropy", "focal", "binary"]] = Field(
        "cross_entropy", description="focal: hard images count more; binary: sigmoid, for two classes."
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
    """How the trained model is tested."""

    tta: Free[Literal["off", "flip", "crops"]] = Field(
        "off", description="Test on the mean of each image and its mirror; crops: also of both shifted by a pixel."
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


class HardwareConfig(Section):
    """What computes, and how exactly. A device decides bits too, but a run may move: the record says where it ran."""

    device: Free[Literal["auto", "cpu", "cuda"]] = Field("auto", description="auto: a GPU if there is one.")
    nproc_per_node: Free[Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]] = Field(
        1, description="Processes a machine that share each batch; auto: one a GPU."
    )
    precision: Decisive[Literal["float32", "bfloat16", "auto"]] = Field(
        "float32", description="bfloat16: autocast in forward; auto: where the hardware has it."
    )
    compile: Decisive[Literal["off", "on", "auto"]] = Field(
        "off", description="torch.compile the model; auto: on a GPU, where a training is long enough to repay it."
    )
    deterministic: Decisive[bool] = Field(True, description="Refuse operations whose result varies from run to run.")


class TrackingConfig(Section):
    """Who else is to see the course of a training."""

    tensorboard: Free[bool] = Field(False, description="Write TensorBoard event files under NIGHTSHIFT_HOME.")


class TrainConfig(Section):
    """Everything that decides which bits a run ends with, and how often it is saved on the way."""

    format: Free[Literal[2]] = 2
    recipe: Free[str] = Field(description="The recipe this started from.")
    seed: Decisive[int] = Field(
        0, ge=0, lt=2**31, description="Of the initial weights, the order and the augmentation."
    )
    model: ModelConfig
    start: StartConfig = StartConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    saving: SavingConfig = SavingConfig()
    hardware: HardwareConfig = HardwareConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.start.name == "pretrained" and not self.start.weights:
            raise ValueError("start=pretrained needs start.weights: a file, s3://BUCKET/KEY, or hub")
        if self.schedule.frozen_epochs >= self.schedule.epochs:
            raise ValueError("schedule.frozen_epochs leaves no epoch in which all is trained: it must be below epochs")
        if self.optimizer.name == "muon" and (self.schedule.frozen_epochs or self.optimizer.layer_decay < 1):
            raise ValueError("muon makes groups of its own: frozen_epochs and layer_decay need another optimizer")
        return self

    @property
    def fine_tunes(self) -> bool:
        """Whether the head is trained otherwise than the rest."""
        return bool(self.schedule.frozen_epochs) or self.optimizer.layer_decay < 1

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate values of any origin, a stored config of any format up to the newest among them.

        Raises:
            ConfigError: naming each bad field, its value and what is allowed; or fields that contradict each other.
        """
        try:
            config = cls.model_validate(of_newest_format(values))
        except ValidationError as error:
            known = dict(fields(cls))
            raise ConfigError("\n".join(_problem(detail, known) for detail in error.errors())) from None
        if problems := list(_contradictions(config)):
            raise ConfigError("\n".join(problems))
        return config

    def override(self, overrides: Mapping[str, Any]) -> Self:
        """This config with some fields replaced; text is parsed as the field's type.

        Args:
            overrides: by dotted name (`optimizer.lr`), or by its last part where only one field has it (`lr`). A
                section's name stands for the field `name` in it (`optimizer`), or for several fields as a mapping.

        Raises:
            ConfigError: as `parse`, and if a name is that of no field, or of several.
        """
        values, problems = self.model_dump(), []
        for name, value in _flattened(overrides):
            try:
                *sections, last = self.path_of(name).split(".")
            except ConfigError as error:
                problems.append(str(error))
                continue
            place = values
            for section in sections:
                place = place[section]
            place[last] = None if value in ("none", "null", "None") else value
        try:
            config = self.parse(values)
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def resumed_with(self, overrides: Mapping[str, Any]) -> Self:
        """This config, which a stored run has, with some of the fields replaced that do not decide the result.

        Raises:
            ConfigError: as `override`, and if a field decides the result: then it would be another run.
        """
        config = self.override(overrides)
        ours, theirs = self.decisive(), config.decisive()
        if changed := [path for path in ours if ours[path] != theirs[path]]:
            raise ConfigError(
                f"{', '.join(changed)}: decides the result, so a stored run keeps it. To train with another value, "
                "start a new run: nightshift train"
            )
        return config

    @classmethod
    def path_of(cls, name: str) -> str:
        """The dotted name of the field that `name` means.

        Raises:
            ConfigError: it is the name of no field, or of several; the message lists them.
        """
        known = [path for path, _ in fields(cls)]
        if name in known:
            return name
        found = [path for path in known if path == f"{name}.name"] or [
            path for path in known if path.endswith(f".{name}")
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{name!r} is the name of several fields: say {' or '.join(found)}")
        short = [path.removesuffix(".name").rpartition(".")[2] for path in known] + known
        raise ConfigError(f"there is no field {name!r}.{near_miss(name, short)} The fields are: {', '.join(known)}")

    @classmethod
    def field(cls, name: str) -> FieldInfo:
        """The field that `name` means; raises ConfigError as `path_of`."""
        return dict(fields(cls))[cls.path_of(name)]

    def value_of(self, name: str) -> Any:
        """The value of the field that `name` means; raises ConfigError as `path_of`."""
        return self.flat()[self.path_of(name)]

    def flat(self) -> dict[str, Any]:
        """Every field's value by its dotted name."""
        return {path: _at(self, path) for path, _ in fields(type(self))}

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the result, by dotted name, without those that only say how often or where."""
        return {path: _at(self, path) for path, field in fields(type(self)) if is_decisive(field)}

    @property
    def digest(self) -> str:
        """sha256, hexadecimal, of the fields that decide the result."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a config by its dotted name; not the number of the format, which is no choice."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        elif name != "format":
            yield prefix + name, field


def _contradictions(config: TrainConfig) -> Iterator[str]:
    """What makes no sense together, though each value is valid; a sentence each."""
    data, augment, loss = config.data, config.augment, config.loss
    if augment.randaugment and augment.trivialaugment:
        yield "augment.randaugment and augment.trivialaugment are two ways to do the same: set one of them"
    if augment.mixes and data.batch_size == 1:
        yield "augment.mixup and augment.cutmix mix the images of a batch, and data.batch_size=1 has only one"
    if config.optimizer.accumulate > data.batch_size:
        yield (
            f"optimizer.accumulate={config.optimizer.accumulate} divides a batch into more parts than "
            f"data.batch_size={data.batch_size} has images"
        )
    if loss.class_weights == "balanced" and data.sampling == "balanced":
        yield "loss.class_weights=balanced and data.sampling=balanced both make up for rare classes: set one of them"
    if loss.name == "binary" and loss.class_weights == "balanced" and augment.mixes:
        yield (
            "loss.name=binary with loss.class_weights=balanced weighs an image by its class, and one that "
            "augment.mixup or augment.cutmix has mixed is of two: set data.sampling=balanced instead of the weights"
        )
    if loss.name != "focal" and loss.gamma != LossConfig().gamma:
        yield f"loss.gamma={loss.gamma} is of the loss focal, and loss.name={loss.name}: set loss.name=focal"


def is_decisive(field: FieldInfo) -> bool:
    """Whether a field decides which bits a run ends with."""
    (effect,) = (mark for mark in field.metadata if isinstance(mark, _Effect))
    return effect.on_bits


def _flattened(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _at(section: Section, path: str) -> Any:
    value: Any = section
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _problem(detail: ErrorDetails, known: Mapping[str, FieldInfo]) -> str:
    parts = [str(part) for part in detail["loc"]]
    # The place of a problem in a union ends with the member of the union.
    path = next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in known), ".".join(parts))
    if detail["type"] == "extra_forbidden":
        return f"there is no field {path!r}.{near_miss(path, known)} The fields are: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{path} is missing"
    if not parts:
        return problem_of(detail)
    return f"{path.removesuffix('.name')}={detail['input']!r} is not valid: {problem_of(detail)}"

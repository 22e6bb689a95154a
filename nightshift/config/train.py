"""TrainConfig: everything that decides which bits a run ends with, and how often it is saved on the way."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nightshift.config.formats import of_newest_format
from nightshift.config.sections import (
    AugmentConfig,
    BudgetConfig,
    DataConfig,
    Decisive,
    EvaluationConfig,
    Free,
    HardwareConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PublishConfig,
    SavingConfig,
    ScheduleConfig,
    Section,
    StartConfig,
    TrackingConfig,
    is_decisive,
)
from nightshift.errors import ConfigError
from nightshift.explain import near_miss, problem_of


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
    budget: BudgetConfig = BudgetConfig()
    hardware: HardwareConfig = HardwareConfig()
    tracking: TrackingConfig = TrackingConfig()
    publish: PublishConfig = PublishConfig()

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
        for name, value in flattened(overrides):
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

    def begun_at(self, start: datetime) -> Self:
        """This config for a run that begins at `start`: `budget.finish_by` as the moment that `BudgetConfig` finds."""
        return self.model_copy(update={"budget": self.budget.begun_at(start)})

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
    choice = config.evaluation
    if choice.validate_every is None and (choice.keep == "best" or choice.patience):
        asked = "evaluation.keep=best" if choice.keep == "best" else f"evaluation.patience={choice.patience}"
        yield f"{asked} rests on the validation images: set evaluation.validate_every=1 to look at them each epoch"
    if loss.name != "focal" and loss.gamma != LossConfig().gamma:
        yield f"loss.gamma={loss.gamma} is of the loss focal, and loss.name={loss.name}: set loss.name=focal"


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is in nested mappings, by dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
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

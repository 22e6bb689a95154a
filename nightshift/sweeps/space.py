"""What a sweep may try: lists of values and ranges of fields of the config."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nightshift.config.project import Project
from nightshift.config.train import TrainConfig
from nightshift.data.names import checked_config
from nightshift.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Range(BaseModel):
    """All values of a field from `low` to `high`, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float
    high: float
    log: bool = False
    """Whether each doubling is as likely as the next."""
    step: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if self.log and (self.low <= 0 or self.step):
            raise ValueError("log needs a low above 0, and no step")
        return self


Space = dict[str, list[Any] | Range]


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of the lists; the field named last changes fastest."""
    values = [wanted for wanted in space.values() if isinstance(wanted, list)]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


def checked_values(
    recipe: str, fixed: Mapping[str, Any], name: str, wanted: Any, project: Project | None = None
) -> list[Any] | Range:
    """A field's values as the config has them: text from the command line has become a number.

    Raises:
        ConfigError: a value is not valid, or named twice.
    """

    def valid(value: Any) -> Any:
        return checked_config(recipe, {**fixed, name: value}, project=project).value_of(name)

    if isinstance(wanted, Mapping):
        try:
            span = Range.model_validate(wanted)
        except ValidationError as error:
            problems = (
                ".".join([name, *map(str, detail["loc"])]) + ": " + detail["msg"].removeprefix("Value error, ")
                for detail in error.errors()
            )
            raise ConfigError("; ".join(problems)) from None
        for bound in (wanted["low"], wanted["high"]):
            valid(bound)
        return span
    if not isinstance(wanted, list) or not wanted:
        raise ConfigError(f"{name}={wanted!r} is not valid: a list of values, or a range with low and high")
    values = [valid(value) for value in wanted]
    if len(set(values)) < len(values):
        raise ConfigError(f"{name}={wanted!r} is not valid: a value is named twice")
    return values


def distributions(space: Space) -> dict[str, "BaseDistribution"]:
    """Optuna's form of a space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(name: str, wanted: list[Any] | Range) -> "BaseDistribution":
        if isinstance(wanted, list):
            return CategoricalDistribution(wanted)
        annotation = TrainConfig.field(name).annotation
        if float in (annotation, *get_args(annotation)):
            return FloatDistribution(wanted.low, wanted.high, log=wanted.log, step=wanted.step)
        return IntDistribution(int(wanted.low), int(wanted.high), log=wanted.log, step=int(wanted.step or 1))

    return {name: distribution(name, wanted) for name, wanted in space.items()}

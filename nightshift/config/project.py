"""The user's project file, `nightshift.toml`: what belongs to a team and not to a machine.

It lies in the working directory of the process that deploys, starts runs or works on them. The setting
NIGHTSHIFT_PROJECT names another.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nightshift.errors import ConfigError
from nightshift.explain import problem_of
from nightshift.ids import parse_own_dataset_name
from nightshift.values import ImageSize, Resize, Storage

PackageName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
"""What stands behind `import`, up to the first dot."""
Effect = Literal["off", "warn", "stop"]
"""What becomes of a night whose images break a rule: nothing, a finding in the report, or no training."""


class Table(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DeploymentConfig(Table):
    """`[deployments.NAME]`: the deployment retrain/NAME of a recipe, or when one of nightshift's own starts by itself.

    What is left out is as nightshift ships it; a deployment of a recipe then starts only by hand.
    """

    recipe: str | None = Field(None, description="What retrain/NAME trains.")
    promote: bool = Field(True, description="Whether retrain/NAME lets a model go live if it is better.")
    cron: str | None = Field(None, description="When, in five fields, such as `0 2 * * *`.")
    timezone: str | None = Field(None, description="A name of the IANA database, such as Europe/Berlin.")


class SplitConfig(Table):
    """How images are divided among training, validation and test, where the source does not say so itself.

    The split is a function of the group alone, so an image stays where it is however many others come.
    """

    test: float = Field(0.1, ge=0, lt=1, description="The share that only the gate and the report see.")
    validation: float = Field(0.1, ge=0, lt=1, description="The share that chooses an epoch.")
    by: str = Field(
        "image", description="`image`, or a column of the table: images with the same value are in one split."
    )

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.test + self.validation >= 1:
            raise ValueError("test and validation leave nothing to train on: together they must be below 1")
        return self


class RulesConfig(Table):
    """What may be wrong with a night's images, `[datasets.NAME.rules]`: an effect for each rule, and its bounds."""

    unreadable: Effect = Field("stop", description="More than `max_unreadable` of the images cannot be read.")
    max_unreadable: float = Field(0.05, ge=0, le=1, description="A share of all images.")
    few_images: Effect = Field("warn", description="A class has fewer than `min_images_per_class` images.")
    min_images_per_class: int = Field(20, ge=1, description="Over all splits.")
    new_class: Effect = Field("warn", description="A class that the last snapshot did not have.")
    gone_class: Effect = Field("stop", description="A class of the last snapshot has no image any more.")
    vanished: Effect = Field("stop", description="More than `max_vanished` of the last snapshot's images are gone.")
    max_vanished: float = Field(0.2, ge=0, le=1, description="A share of the last snapshot's images.")
    relabelled: Effect = Field(
        "stop", description="More than `max_relabelled` of a class' images stand under other labels now."
    )
    max_relabelled: float = Field(
        0.3, ge=0, le=1, description="A share of what is still there of a class of the last snapshot."
    )
    label_shift: Effect = Field("warn", description="A class' share changed by more than `max_label_shift`.")
    max_label_shift: float = Field(
        0.1, ge=0, le=1, description="The largest change of one class' share since the last snapshot."
    )
    duplicates: Effect = Field("warn", description="The same file stands in the data set more than once.")
    conflicts: Effect = Field("warn", description="One image stands under two labels. All its copies are left out.")
    near_duplicates: Effect = Field(
        "warn", description="Images to train on are nearly the same as ones to validate or test on."
    )
    groups: Effect = Field("warn", description="A group stands in two splits that the source itself names.")


class DatasetConfig(Table):
    """Where a team's images are and how they are stored, `[datasets.NAME]`."""

    source: str = Field(
        min_length=1,
        description="A folder or s3:// prefix with one folder a class, or a table: .csv, .jsonl or .parquet. In the "
        "project file, a path is relative to the file's folder.",
    )
    profile: str | None = Field(None, description="The AWS profile to read an s3:// source with.")
    endpoint_url: str | None = Field(
        None, pattern=r"^https?://\S+$", description="The S3-compatible endpoint of an s3:// source."
    )
    image_size: ImageSize | Literal["auto"] = Field(
        "auto", description="Images are stored as so many pixels square; auto: as the first ones are, up to 128."
    )
    resize: Resize = Field("crop", description="How an image is made square.")
    storage: Storage | Literal["auto"] = Field(
        "auto",
        description="Images are stored as pixels or, encoded, as JPEG, of which more fit into a disk than into memory; "
        "auto: as they were before, and at first by how many they are.",
    )
    split: SplitConfig = SplitConfig()
    rules: RulesConfig = RulesConfig()
    retrain_unchanged: bool = Field(False, description="Train also when nothing has changed since the last run.")


class RecipeConfig(BaseModel):
    """A recipe of the team's own, `[recipes.NAME]`: another one, with some fields replaced."""

    model_config = ConfigDict(frozen=True, extra="allow")

    base: str = Field("quick", description="The recipe whose fields these replace.")

    @property
    def overrides(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Project(Table):
    """All of `nightshift.toml`."""

    plugins: tuple[PackageName, ...] = Field(
        (), description="The only packages, of the team's own, in which a config may name code."
    )
    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)
    recipes: dict[str, RecipeConfig] = Field(default_factory=dict)
    deployments: dict[str, DeploymentConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        for name in self.datasets:
            try:
                parse_own_dataset_name(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self


def load_project(path: Path) -> Project:
    """Read a project file; one that is not there says nothing. Relative sources are made absolute.

    Raises:
        ConfigError: it is not TOML, or has a table or a field that is not one of ours; each is named.
    """
    try:
        project = Project.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Project()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in detail['loc'])}: {problem_of(detail)}" for detail in error.errors()
        )
        raise ConfigError(f"{path}: {problems}") from None
    except (OSError, ValueError) as error:  # tomllib's and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path} cannot be read: {error}") from None
    folder = path.absolute().parent
    datasets = {
        name: dataset.model_copy(update={"source": _below(folder, dataset.source)})
        for name, dataset in project.datasets.items()
    }
    return project.model_copy(update={"datasets": datasets})


def _below(folder: Path, source: str) -> str:
    return source if source.startswith(("s3://", "~")) else str(folder / source)

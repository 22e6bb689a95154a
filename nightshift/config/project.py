"""The user's project file, `nightshift.toml`: what belongs to a team and not to a machine.

It lies in the working directory of whoever deploys; the setting NIGHTSHIFT_PROJECT names another.
"""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nightshift.errors import ConfigError
from nightshift.explain import problem_of


class DeploymentConfig(BaseModel):
    """When a deployment starts by itself, `[deployments.NAME]`; what is left out is as nightshift ships it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str | None = Field(None, description="When, in five fields, such as `0 2 * * *`.")
    timezone: str | None = Field(None, description="A name of the IANA database, such as Europe/Berlin.")


class Project(BaseModel):
    """All of `nightshift.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deployments: dict[str, DeploymentConfig] = Field(default_factory=dict)


def load_project(path: Path) -> Project:
    """Read a project file; one that is not there says nothing.

    Raises:
        ConfigError: it is not TOML, or has a table or a field that is not one of ours; each is named.
    """
    try:
        return Project.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Project()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in detail['loc'])}: {problem_of(detail)}" for detail in error.errors()
        )
        raise ConfigError(f"{path}: {problems}") from None
    except (OSError, ValueError) as error:  # tomllib's and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path} cannot be read: {error}") from None

"""The networks, losses and transforms that a config may name, and the team's own code behind them.

Only this machine's project file admits a team's own code: its `plugins` lists the packages. The file is read here, each
time it matters, so that nobody can pass in another list. No stored record, card or sweep, no parameter of a flow and no
option of a command chooses which code runs. This module imports no torch.
"""

import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from models.names import MODELS, TORCHVISION, known_models, sizes_of
from nightshift.config.project import load_project
from nightshift.config.sections import LOSSES
from nightshift.config.train import TrainConfig
from nightshift.errors import ConfigError
from nightshift.explain import near_miss
from nightshift.settings import Settings


class Kind(NamedTuple):
    """What code of the team's own may be, and what it has to be called with."""

    title: str
    """What it is called in messages."""
    group: str
    """The entry points by which an installed package gives it a short name."""
    takes: str
    others: Callable[[], list[str]]
    """The names that need no plug-in."""
    hint: str = ""


MODEL = Kind(
    "model",
    "nightshift.models",
    "the number of classes and the side of the images, and returns a torch.nn.Module",
    known_models,
    "; and those of torchvision, timm and your own that `nightshift models` lists",
)
LOSS = Kind(
    "loss",
    "nightshift.losses",
    "the number of classes and the training images' labels, and returns a function of logits and targets",
    lambda: list(LOSSES),
    "; and your own",
)
TRANSFORM = Kind(
    "transform",
    "nightshift.transforms",
    "the side of the images, and returns a function of an image",
    list,
)
LIBRARIES = ("torchvision", "timm")
"""Whose networks a config may name as LIBRARY:NAME, whatever the project file says."""
_PLACE = re.compile(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


class Place(NamedTuple):
    """Where code of the team's own is: a module of a package that may run here, and a name in it."""

    module: str
    attribute: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def library_of(name: str) -> str | None:
    """The library that a network is named in; None for one of nightshift's or of the team's own."""
    library = name.partition(":")[0]
    return library if ":" in name and library in LIBRARIES else None


def is_own(name: str) -> bool:
    """Whether a name can only be that of a network of the team's own."""
    return name not in MODELS and not library_of(name)


def check_network_name(name: str) -> None:
    """Find out, without importing it, whether a network can be named so on this machine.

    The names of timm's networks are known only to timm, which imports torch.

    Raises:
        ConfigError: there is no such network, its package is missing, or the project file does not admit it.
    """
    if is_own(name):
        place_of(name)
    elif library_of(name) == "timm" and not find_spec("timm"):
        raise ConfigError(f"model {name!r} needs a package that is not here: install nightshift[timm]")
    elif library_of(name) == "torchvision":
        try:
            sizes_of(name)
        except ValueError as error:
            miss = near_miss(name.partition(":")[2], TORCHVISION)
            raise ConfigError(f"{error}.{miss} `nightshift models` lists those it has") from None


def check_names_of_code(config: TrainConfig) -> None:
    """Find out, without importing it, whether all code that a config names may run on this machine, and is here.

    Raises:
        ConfigError: as `check_network_name`.
    """
    check_network_name(config.model.name)
    for kind, name in own_of(config):
        place_of(name, kind)


def own_of(config: TrainConfig) -> list[tuple[Kind, str]]:
    """All code of the team's own that a config names, the network aside."""
    named = [(LOSS, config.loss.name)] if config.loss.name not in LOSSES else []
    return named + ([(TRANSFORM, config.augment.transform)] if config.augment.transform is not None else [])


def place_of(name: str, kind: Kind = MODEL) -> Place:
    """Where code of the team's own is, whose package the project file admits and this machine has.

    Raises:
        ConfigError: as `check_network_name`.
    """
    text, what = name if ":" in name else _entry_point(name, kind), f"{kind.title} {name!r}"
    if not _PLACE.fullmatch(text):
        raise ConfigError(f"{what} is not valid: one of your own is named PACKAGE.MODULE:NAME")
    module, _, attribute = text.partition(":")
    place, project = Place(module, attribute), Settings.load().project
    if place.package not in load_project(project).plugins:
        raise ConfigError(
            f"{what} names code of the package {place.package}, which `plugins` of {project} does not admit on "
            f'this machine, so none of it is run. If you trust it, write there: plugins = ["{place.package}"]'
        )
    # Last, so that nothing that is installed is hidden. Whoever can write beside the file can write the file too.
    if (folder := str(project_folder())) not in sys.path:
        sys.path.append(folder)
    if not find_spec(place.package):
        raise ConfigError(
            f"{what}: the package {place.package} is not installed on this machine. Install it, or put "
            f"{place.package}.py beside {project}"
        )
    return place


def load(name: str, kind: Kind = MODEL) -> Callable[..., Any]:
    """What makes a network, a loss or a transform of the team's own.

    Raises:
        ConfigError: as `place_of`; or it cannot be imported, is not there, or is nothing that can be called; or it was
            defined in a package that the project file does not admit.
    """
    place, what = place_of(name, kind), f"{kind.title} {name!r}"
    try:
        module = import_module(place.module)
        found = getattr(module, place.attribute, None)
    except (Exception, SystemExit) as error:  # whatever somebody's code does when it is imported
        raise ConfigError(f"{what} cannot be imported: {explained(error, place.package)}") from error
    if found is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        raise ConfigError(
            f"{what}: there is no {place.attribute} in {module.__name__}.{near_miss(place.attribute, public)} "
            f"Define it in {getattr(module, '__file__', None)}, or name another"
        )
    if not callable(found):
        raise ConfigError(
            f"{what} is a {type(found).__name__}, which cannot be called: name a class or function that takes "
            f"{kind.takes}"
        )
    defined_in = found.__module__ if inspect.isroutine(found) or inspect.isclass(found) else None
    if defined_in and defined_in.partition(".")[0] not in load_project(Settings.load().project).plugins:
        raise ConfigError(
            f"{what} is {defined_in}:{found.__qualname__}, and `plugins` of the project file does not admit "
            f"{defined_in.partition('.')[0]}, so it is not called. Define a function of your own that calls it"
        )
    return found  # type: ignore[no-any-return]


def described(name: str) -> str | None:
    """The code behind a network, in one line: package, version and, for the team's own, a digest of its Python files.

    None for nightshift's own, whose version a run's environment names anyway.

    Raises:
        ConfigError: as `check_network_name`.
    """
    if name in MODELS:
        return None
    check_network_name(name)
    if library := library_of(name):
        return f"{library} {metadata.version(library)}"
    return _described(place_of(name).package)


def all_described(config: TrainConfig) -> dict[str, str]:
    """For the run record: which code a config names that is not nightshift's own. When it changes, a resume warns.

    Raises:
        ConfigError: as `check_names_of_code`.
    """
    network = described(config.model.name)
    own = {kind.title: _described(place_of(name, kind).package) for kind, name in own_of(config)}
    return own if network is None else {"network": network, **own}


def _described(package: str) -> str:
    digest = hashlib.sha256()
    for shown, file in sorted(_sources(package)):
        digest.update(f"{shown} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return f"{' '.join(filter(None, (package, _version(package))))}, sha256 {digest.hexdigest()}"


def project_folder() -> Path:
    """Where this machine's project file is, or would be."""
    return Settings.load().project.absolute().parent


def own_networks() -> list[str]:
    """The names of the team's own networks that are known without running them: entry points, and those of recipes."""
    project = load_project(Settings.load().project)
    points = {point.name for point in metadata.entry_points(group=MODEL.group)}
    recipes = {recipe.overrides.get(field) for recipe in project.recipes.values() for field in ("model", "model.name")}
    names = []
    for name in sorted(points | {name for name in recipes if isinstance(name, str)}):
        if is_own(name):
            try:
                place_of(name)
            except ConfigError:
                continue
            names.append(name)
    return names


def explained(error: BaseException, package: str) -> str:
    """An exception in a line, and where in the package it came about, if it did so there."""
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    files = {file: shown for shown, file in _sources(package)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if shown := files.get(Path(frame.filename)):
            return f"{said} ({shown}, line {frame.lineno})"
    return said


@contextmanager
def told(what: str, package: str) -> Iterator[None]:
    """Turn whatever somebody's code raises in the block into a ConfigError: `what`, then the reason in one line."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what}: {explained(error, package)}") from error


def _entry_point(name: str, kind: Kind) -> str:
    places = {point.value for point in metadata.entry_points(group=kind.group, name=name)}
    if len(places) == 1:
        return places.pop()
    if places:
        raise ConfigError(f"{kind.title} {name!r} is the name of several: say {' or '.join(sorted(places))}")
    known = kind.others()
    plural = f"{kind.title}{'es' if kind is LOSS else 's'}"
    listed = f"The {plural} are: {', '.join(known)}{kind.hint}" if known else "Yours is named PACKAGE.MODULE:NAME"
    raise ConfigError(f"there is no {kind.title} {name!r}.{near_miss(name, known)} {listed}")


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    """The Python files of a top-level package or module: how each is called within it, and where it is."""
    try:
        spec = find_spec(package)
    except ValueError:  # of a script that is being run
        return
    if spec and spec.submodule_search_locations:
        for folder in map(Path, spec.submodule_search_locations):
            for file in folder.rglob("*.py"):
                yield f"{package}/{file.relative_to(folder).as_posix()}", file
    elif spec and spec.origin and Path(spec.origin).is_file():
        yield Path(spec.origin).name, Path(spec.origin)


def _version(package: str) -> str | None:
    """The version of the distribution that a package belongs to; a file beside the project file belongs to none."""
    distributions = metadata.packages_distributions().get(package, [package])
    try:
        return metadata.version(distributions[0])
    except metadata.PackageNotFoundError:
        return None

"""The network that a config names: made here and nowhere else, and tried before the first step of a run."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from models import build_model, from_timm
from models.names import MODELS, check_image_size
from models.protocols import NetworkFactory
from nightshift import plugins
from nightshift.errors import ConfigError, DataUnavailableError
from nightshift.explain import near_miss

_PAGE = "docs/networks.md says what a network has to be"


def build_network(name: str, classes: int, image_size: int) -> nn.Module:
    """A freshly initialized network for float32 images (batch, 3, image_size, image_size): logits (batch, classes).

    A seed decides its weights, as they come from torch's global generator.

    Raises:
        ConfigError: there is no such network here, the project file does not admit its code, it takes no images of
            this size, or it cannot be made.
    """
    make = network_factory(name)
    if name in MODELS:
        return make(classes, image_size)
    return _attempt(name, classes, image_size).make(make)


def network_factory(name: str) -> NetworkFactory:
    """What makes the network of this name, after it was imported.

    Raises:
        ConfigError: there is no such network here, or the project file does not admit its code.
    """
    plugins.check_network_name(name)
    if plugins.is_own(name):
        return plugins.load(name)
    if plugins.library_of(name) == "timm":
        known, wanted = from_timm.names(), name.partition(":")[2]
        if wanted not in known:
            raise ConfigError(
                f"timm has no network {wanted!r}.{near_miss(wanted, known)} `nightshift models` lists those it has"
            )
    return partial(_ready_made, name)


def _ready_made(name: str, classes: int, image_size: int) -> nn.Module:
    try:
        check_image_size(name, image_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return build_model(name, classes, image_size)


def statistics_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, on the scale 0 to 255, by which a library's network was trained.

    Raises:
        ConfigError: it is no library's, or there is no such network.
    """
    network_factory(name)
    if not (library := plugins.library_of(name)):
        raise ConfigError(f"model {name!r} has no mean and deviation of its own: set data.normalization to another")
    mean, deviation = import_module(f"models.from_{library}").statistics(name.partition(":")[2])
    return tuple(255 * value for value in mean), tuple(255 * value for value in deviation)


def pretrained_weights(name: str) -> dict[str, Tensor]:
    """The weights that a library publishes for one of its networks, from the library's own cache or the network.

    Raises:
        DataUnavailableError: they cannot be downloaded, or there are none.
    """
    library, _, of_library = name.partition(":")
    try:
        return dict(import_module(f"models.from_{library}").pretrained(of_library))
    except Exception as error:  # whatever a library and its ways through the network raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataUnavailableError(
            f"{library} cannot give its weights of {of_library}: {reason:.200}. Where there is no network, set "
            "start.weights to a file that has them"
        ) from error


@lru_cache(maxsize=8)
def head_of(name: str, classes: int, image_size: int) -> dict[str, int]:
    """The tensors of a network that have one entry per class: by name, the dimension that counts the classes.

    They make up the last layer. Comparing with the network for one more class finds them without a rule for names.

    Raises:
        ConfigError: as `build_network`.
    """
    with torch.random.fork_rng(devices=[]):
        ours, more = (build_network(name, count, image_size).state_dict() for count in (classes, classes + 1))
    sizes = {key: zip(ours[key].shape, more[key].shape, strict=False) for key in ours if key in more}
    differing = {
        key: [(at, *pair) for at, pair in enumerate(pairs) if pair[0] != pair[1]] for key, pairs in sizes.items()
    }
    return {
        key: found[0][0] for key, found in differing.items() if [pair[1:] for pair in found] == [(classes, classes + 1)]
    }


def check_network(
    name: str,
    classes: int,
    image_size: int,
    smallest_batch: int,
    averaged: bool,
    build_optimizer: Callable[[nn.Module], object],
) -> None:
    """Find out, on made-up images, whether a network can be trained, stored and published. Nightshift's own always can.

    Args:
        smallest_batch: how many images the network sees at once at the least.
        averaged: whether a moving average of its weights is kept.
        build_optimizer: makes the run's optimizer for it; raises ConfigError if it cannot.

    Raises:
        ConfigError: it cannot. The message names the first thing that is wrong.
    """
    if name not in MODELS:
        with torch.random.fork_rng(devices=[]):
            network = build_network(name, classes, image_size)
            # Export takes seconds, so only a team's own networks are exported here; our tests export the libraries'.
            _attempt(name, classes, image_size).check(network, smallest_batch, averaged, plugins.is_own(name))
            build_optimizer(network)


def exported_program(network: nn.Module, images: Tensor) -> ExportedProgram:
    """A network in inference mode, as `torch.export` has it, for batches of any size of such images."""
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@dataclass(frozen=True)
class Attempt:
    """Makes somebody's network and does with it what a run does. Whatever goes wrong becomes a ConfigError."""

    name: str
    package: str
    """Whose files are named if something goes wrong in them."""
    classes: int
    image_size: int

    def make(self, factory: Callable[[int, int], Any]) -> nn.Module:
        """The network; raises ConfigError if there comes none."""
        what = f"cannot be made for {self.classes} classes and images of {self.image_size} pixels"
        network = self._tried(what, lambda: factory(self.classes, self.image_size))
        if not isinstance(network, nn.Module):
            raise self._wrong(f"is made as {kind_of(network)}, which is no torch.nn.Module")
        return network

    def check(self, network: nn.Module, smallest_batch: int, averaged: bool, exported: bool) -> None:
        """Raise ConfigError unless it can be trained, stored and published. It is of no use afterwards.

        Args:
            smallest_batch, averaged: as of `check_network`.
            exported: whether to see if `torch.export` can write it, which takes seconds.
        """
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise self._wrong("has no parameters that are trained")
        for key, value in self._tried("has no state_dict", network.state_dict).items():
            if not isinstance(value, Tensor):
                raise self._wrong(f"keeps {kind_of(value)} as {key} in its state_dict, where only tensors are stored")
        if averaged:
            self._tried("cannot be copied, as optimizer.ema_decay needs it", lambda: copy.deepcopy(network))
        network.to(memory_format=torch.channels_last)
        network.train()
        self._step(network, 2, f"cannot be trained on images of {self.image_size} pixels")
        if smallest_batch == 1:
            self._step(
                network,
                1,
                "cannot be trained on one image, which is all that an epoch's last batch, or a part of it, has (set "
                "drop_last=true, or a lower accumulate)",
            )
        if not any(parameter.grad is not None for parameter in network.parameters()):
            raise self._wrong("returns logits that depend on none of its parameters")
        network.eval()
        images = self._images(2)
        with torch.inference_mode():
            self._check_logits(self._tried("cannot predict", lambda: network(images)), 2)
        if exported:
            what = "cannot be exported by torch.export, so what it learns could never be published"
            self._tried(what, lambda: exported_program(network, images))

    def _step(self, network: nn.Module, count: int, what: str) -> None:
        images, labels = self._images(count), torch.arange(count) % self.classes
        logits = self._tried(what, lambda: network(images))
        self._check_logits(logits, count)
        if logits.requires_grad:
            loss = F.cross_entropy(logits, labels)
            self._tried(what, lambda: loss.backward())  # type: ignore[no-untyped-call]

    def _check_logits(self, logits: object, count: int) -> None:
        expected = (count, self.classes)
        if not isinstance(logits, Tensor):
            raise self._wrong(f"returns {kind_of(logits)}, not one tensor of logits {expected}")
        if logits.shape != expected or not logits.is_floating_point():
            raise self._wrong(f"returns {kind_of(logits)} for {count} images, not float logits {expected}")

    def _images(self, count: int) -> Tensor:
        return torch.randn(count, 3, self.image_size, self.image_size).to(memory_format=torch.channels_last)

    def _tried(self, what: str, call: Callable[[], Any]) -> Any:
        with plugins.told(f"model {self.name!r} {what}", self.package):
            return call()

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"model {self.name!r} {what}. {_PAGE}")


def _attempt(name: str, classes: int, image_size: int) -> Attempt:
    package = plugins.library_of(name) or plugins.place_of(name).package
    return Attempt(name, package, classes, image_size)


def kind_of(value: object) -> str:
    """What somebody's code has returned, for a message: dtype and shape of a tensor, else the name of its type."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"

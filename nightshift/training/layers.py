"""A network's head and what comes before it, for trainings in which both are not trained alike."""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nightshift.errors import ConfigError

_GROUPS = 12
"""Into so many groups the layers before the head are divided at most: an optimizer does each by itself."""


def split_groups(groups: list[dict[str, Any]], model: nn.Module, head: Collection[str]) -> list[dict[str, Any]]:
    """Each group in two, `backbone` True and False, where it has parameters of both. What is fixed is in none.

    Raises:
        ConfigError: the network has no head, or nothing else.
    """
    of_head = {id(parameter) for name, parameter in model.named_parameters() if name in head}
    found = []
    for group in groups:
        for backbone in (True, False):
            params = [one for one in group["params"] if one.requires_grad and (id(one) not in of_head) == backbone]
            if params:
                found.append({**group, "params": params, "backbone": backbone})
    if len({group["backbone"] for group in found}) < 2:
        raise ConfigError(
            "the model has no last layer that is as large as the number of classes, with others before it: "
            "layer_decay and frozen_epochs are for models that have"
        )
    return found


def groups_by_depth(model: nn.Module, head: Collection[str], first: float) -> list[dict[str, Any]]:
    """The parameters in groups whose rates fall from the head, 1, to the first layer, `first`, by equal factors.

    So are "discriminative" rates (Howard and Ruder 2018, arXiv 1801.06146). Layers count in the order in which the
    network has defined them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers, seen = [], set[int]()
    for module in model.modules():
        layer = [one for one in module.parameters(recurse=False) if names[id(one)] not in head and id(one) not in seen]
        seen.update(map(id, layer))
        if layer:
            layers.append(layer)
    count = min(_GROUPS, len(layers))
    groups: list[dict[str, Any]] = [{"params": [], "scale": first ** (1 - number / count)} for number in range(count)]
    for number, layer in enumerate(layers):
        groups[number * count // len(layers)]["params"] += layer
    return [*groups, {"params": [one for one in model.parameters() if names[id(one)] in head], "scale": 1.0}]


def freeze_statistics(model: nn.Module, frozen: bool) -> None:
    """Let batch norm use its stored statistics while the layers around it are not trained, else those of the batch."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(not frozen)

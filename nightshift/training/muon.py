"""Muon: momentum whose update is made orthogonal. torch's own takes only matrices, not convolution filters."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from nightshift.hardware import device_of, native_precision

# Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): a quintic chosen for its slope at 0.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 3
_MOMENTUM = 0.85
# The published rates of airbench94_muon for batches of 2000, as multiples of Muon's 0.24. There the loss is a sum over
# the batch (hence 2000) and the logits are divided by the width (hence 256 squared).
_BIAS_SCALE = 0.053 * 2000 / 0.24
_HEAD_SCALE = 0.67 * 2000 / 256**2 / 0.24
_WHITENING_SHARE = 3 / 8


class Muon(optim.Optimizer):
    """Muon for the filters of convolutions; SGD with Nesterov momentum 0.85 for biases and linear layers.

    Each filter bank (out, in, height, width) is treated as a matrix of `out` rows, and keeps a Frobenius norm of √out.
    The bias of a layer with fixed weights, such as a whitening layer, is trained only in the first 3/8 of the steps.
    `weight_decay` applies to SGD's part. It is decoupled: the share that one step takes off at the highest rate.

    Matrices are made orthogonal in bfloat16, or in float32 where the hardware would emulate it: there it took half of
    a step of `quick`. The state says which, so that a run ends as it began, on whatever hardware it goes on.
    """

    # As torch has written them. It wraps them to tell its compiler to leave them alone, and imports it for that: 2 s.
    # Only networks are ever compiled here.
    add_param_group = inspect.unwrap(optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(optim.Optimizer.zero_grad)

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        filters: list[nn.Parameter] = []
        heads: list[nn.Parameter] = []
        biases: list[nn.Parameter] = []
        whitening: list[nn.Parameter] = []
        for module in model.modules():
            weight_is_fixed = isinstance(module, nn.Conv2d) and not module.weight.requires_grad
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                if name == "bias":
                    (whitening if weight_is_fixed else biases).append(parameter)
                else:
                    (filters if parameter.ndim == 4 else heads).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": filters, "scale": 1.0, "momentum": momentum, "orthogonal": True},
            {"params": heads, "scale": _HEAD_SCALE},
            {"params": biases, "scale": _BIAS_SCALE},
            {"params": whitening, "scale": _BIAS_SCALE, "share": _WHITENING_SHARE},
        ]
        for group in groups[1:]:
            group |= {"momentum": _MOMENTUM, "orthogonal": False, "weight_decay": weight_decay / (lr * group["scale"])}
        super().__init__([group for group in groups if group["params"]], {"lr": lr})
        self.precision = native_precision(device_of(model))

    def state_dict(self) -> dict[str, Any]:
        return {**inspect.unwrap(optim.Optimizer.state_dict)(self), "precision": self.precision}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. A state of before there was a choice is one of bfloat16."""
        inspect.unwrap(optim.Optimizer.load_state_dict)(self, state_dict)
        self.precision = state_dict.get("precision", "bfloat16")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure`, if given, first computes them and the loss."""
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["orthogonal"]:
                    update = self._nesterov(parameter, parameter.grad, group).flatten(1)
                    update = orthogonalized(update.bfloat16() if self.precision == "bfloat16" else update)
                    parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                else:
                    gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                    update = self._nesterov(parameter, gradient, group)
                parameter.sub_(update.reshape(parameter.shape), alpha=group["lr"])
        return loss

    def _nesterov(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        buffer.mul_(group["momentum"]).add_(gradient)
        return gradient.add(buffer, alpha=group["momentum"])


def orthogonalized(matrix: Tensor) -> Tensor:
    """Approximately UVᵀ, where USVᵀ is the singular value decomposition, by Newton-Schulz iteration.

    Args:
        matrix: float32 or bfloat16 (rows, columns).

    Returns:
        of the same dtype and shape, with singular values between about 0.5 and 1.5 where they were not tiny.
    """
    a, b, c = _QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    x = x.T if is_tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x

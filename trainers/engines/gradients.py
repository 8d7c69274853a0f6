"""The summed gradient, and arithmetic on it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.tensors.sharding import local


class Gradients:
    """The summed gradients of an optimizer's parameters, each in its ``grad``.

    Attributes:
        parameters: all of them, in the order of the groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._held: list[Tensor] | None = None

    def held(self) -> list[Tensor]:
        """Return what this rank holds of all of them, in its own memory; they are looked for once a step."""
        if self._held is None:
            for parameter in self.parameters:
                if parameter.grad is None:  # has no part in the loss: a zero, as it is where some rank has no samples
                    parameter.grad = torch.zeros_like(parameter)
            self._held = [local(parameter.grad) for parameter in self.parameters]
        return self._held

    def norm(self) -> Number:
        """Return their norm."""
        return number(norm_of(self.held()))

    def multiply(self, factor: Number) -> None:
        """Multiply them in place."""
        multiply(self.held(), factor)
        self._held = None

    def step(self, factor: Number) -> None:
        """Multiply them, step the optimizer, drop them."""
        self.multiply(factor)
        self._optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forget them."""
        self._held = None
        self._optimizer.zero_grad(set_to_none=True)


def clipped(scale: Number, norm: Number, clip_norm: float | None) -> Number:
    """Return ``scale``, with what clips a gradient whose norm is then ``norm``."""
    if clip_norm is None:
        return scale
    limit = clip_norm / (norm + 1e-6)
    return scale * (limit.clamp(max=1.0) if isinstance(limit, Tensor) else min(limit, 1.0))


def multiply(gradients: list[Tensor], factor: Number) -> None:
    """Multiply all of them by ``factor``, in place; for those that are in the host's memory it is brought there."""
    if isinstance(factor, Tensor):
        torch._foreach_mul_(gradients, factor.float().to(gradients[0].device))
    elif factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def norm_of(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all of them together, 0-dim float64."""
    gradients = [torch.view_as_real(gradient) if gradient.is_complex() else gradient for gradient in gradients]
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    norms: Tensor = torch.stack(torch._foreach_norm(gradients, 2, wide))
    return cast(Tensor, torch.linalg.vector_norm(norms)).double()


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient, which has to be there."""
    assert parameter.grad is not None
    return parameter.grad


def number(scalar: Tensor) -> Number:
    """Return a float, where a look at it doesn't wait for a device."""
    return scalar.item() if scalar.is_cpu else scalar

"""Let a tensor travel with the gradients, as the gradient of a parameter of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attach(loss: Tensor, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Return `loss` unchanged; its backward adds to the gradient of `parameter` what `gradient` holds by then."""
    attached: Tensor = _Attach.apply(loss, parameter, gradient)  # type: ignore[no-untyped-call]
    return attached


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add `gradient` to that of `parameter`, as a backward does."""
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.gradient.clone(), None

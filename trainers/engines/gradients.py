"""Arithmetic on gradients."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from isobatch.trainers.engines.step_report import Number


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

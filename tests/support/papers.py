"""Compute LAMB and LARS as in their papers, in float64, and run a few steps of any optimizer to compare with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PATHS = [True, False]  # native or not
SHAPES = [(300, 300), (70, 130), (5,), (2, 3, 4), (), (3, 0), (4, 4), (6, 2)]
ZERO_WEIGHTS, ZERO_GRADIENT = 6, 7
STEPS = 4
EVERYTHING = (0.0, float("inf"))


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]
    made[ZERO_WEIGHTS].zero_()
    return [nn.Parameter(each) for each in made]


def gradients(step: int) -> list[Tensor]:
    made = [each.detach() for each in weights(seed=step)]
    made[ZERO_WEIGHTS] += 1
    made[ZERO_GRADIENT].zero_()
    return made


def lamb_by_the_paper(
    w: Tensor, gs: list[Tensor], *, lr: float, decay: float, eps: float, betas: tuple[float, float] = (0.9, 0.99),
    correction: Any = True, trust: tuple[float, float] = EVERYTHING, phi: tuple[float, float] = EVERYTHING,
    adapt: bool = True,
) -> Tensor:  # fmt: skip
    w, m, v = w.double(), 0.0, 0.0
    for t, g in enumerate((g.double() for g in gs), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        r = (m / c1) / ((v / c2) ** 0.5 + eps) if correction is True else m / (v**0.5 + eps)
        u = r + decay * w
        ratio = 1.0
        if adapt and w.norm() > 0 and u.norm() > 0:
            ratio = min(max(min(max(float(w.norm()), phi[0]), phi[1]) / float(u.norm()), trust[0]), trust[1])
        w = w - lr * ratio * (c2**0.5 / c1 if correction == "after" else 1.0) * u
    return w


def lars_by_the_paper(
    w: Tensor, gs: list[Tensor], *, lr: float, decay: float, eps: float = 0.0, momentum: float = 0.9,
    trust: float = 0.01, nesterov: bool = False, scaled: bool = True, clip: bool = False, adapt: bool = True,
) -> Tensor:  # fmt: skip
    w, v = w.double(), 0.0
    for step, g in enumerate(g.double() for g in gs):
        eta = lr / (1 + step)  # a falling LR distinguishes momentum of steps from momentum of gradients
        local = 1.0
        if adapt and w.norm() > 0 and g.norm() > 0:
            local = trust * float(w.norm()) / (float(g.norm()) + decay * float(w.norm()) + eps)
            local = min(local / eta, 1.0) if clip else local
        d = local * (g + decay * w) * (eta if scaled else 1.0)
        v = momentum * v + d
        w = w - (d + momentum * v if nesterov else v) * (1.0 if scaled else eta)
    return w


def after_steps(
    make: Callable[..., torch.optim.Optimizer],
    *,
    falling: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Tensor]:
    parameters = weights(dtype)
    optimizer = make(parameters, **options)
    first = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(1 + step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr / (1 + step) if falling else lr
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def close(found: Tensor, wanted: Tensor, within: float = 1e-6) -> bool:
    return wanted.numel() == 0 or float((found.double() - wanted).abs().max()) <= within * (
        1 + float(wanted.abs().max())
    )

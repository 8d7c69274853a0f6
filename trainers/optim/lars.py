"""LARS: SGD with momentum, each tensor's step scaled by the norms of its weights and gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from isobatch.trainers.optim.kernels import call
from isobatch.trainers.optim.layerwise import Layerwise, Part
from isobatch.trainers.ranks.internals import foreach_add_, foreach_addcmul_, foreach_mul_

PAPER = {
    "eps": 0.0,  # ε; the paper has none, timm 1e-8
    "nesterov": False,  # Nesterov momentum
    "scaled_momentum": True,  # False: v sums gradients instead of steps, as in torch's SGD and timm: w ← w − η·v
    "trust_clip": False,  # use min(local, η) instead of η·local (LARC, and timm's ``trust_clip``)
    "always_adapt": False,  # scale groups with ``trust=False``, too
    "maximize": False,  # ascend
}
"""The options in which implementations differ, with the values of the paper."""


class LARS(Layerwise):
    """LARS (You et al. 2017, arXiv:1708.03888, algorithm 1); its variants are options.

        local = c·‖w‖ / (‖g‖ + λ·‖w‖ + ε)      per tensor; 1 where a norm is 0
        v ← momentum·v + η·local·(g + λ·w)         w ← w − v

    Tuned Nesterov momentum has been found to do as well at the batches of LARS (Nado et al. 2021, arXiv:2102.06356).

    Args:
        params: parameters or groups; a group's ``trust=False`` makes ``local`` 1.
        lr: η.
        momentum: the decay of v.
        trust_coefficient: c.
        weight_decay: λ.
        native: use the C kernel for float32 on the CPU, if it can be built.
        variant: options that differ from PAPER.

    Raises:
        ValueError: a number is out of its range.
        UserError: in ``step``, a gradient is sparse or a parameter complex.
    """

    keeps = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float = 2e-4,
        *,
        native: bool = True,
        **variant: Any,
    ) -> None:
        eps = variant.get("eps", PAPER["eps"])
        if not (lr >= 0 and trust_coefficient > 0 and weight_decay >= 0 and eps >= 0 and 0 <= momentum < 1):
            positive = f"{lr=}, {weight_decay=} and {eps=} have to be 0 or more, {trust_coefficient=} above 0"
            raise ValueError(f"{positive}, and {momentum=} in [0, 1)")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **PAPER}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient}, variant, native)

    def _update(self, group: dict[str, Any], part: Part) -> None:
        names = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
        lr, momentum, decay, c, eps = (float(group[name]) for name in names)
        c, most = (c / lr if lr else math.inf, 1.0) if group["trust_clip"] else (c, math.inf)
        inner, outer = (lr, 1.0) if group["scaled_momentum"] else (1.0, lr)
        adapt = bool(group["trust"] or group["always_adapt"])
        nesterov, maximize = bool(group["nesterov"]), bool(group["maximize"])
        if part.native:
            tensors = (part.weights, part.gradients, part.state["momentum_buffer"])
            call("lars", tensors, inner, outer, momentum, decay, c, eps, most, adapt, nesterov, maximize)
            return
        rates = torch.full((len(part.weights),), inner, device=part.weights[0].device, dtype=part.weights[0].dtype)
        if adapt:
            weights, gradients = part.norms(part.weights), part.norms(part.gradients)
            local = (c * weights / (gradients + decay * weights + eps)).clamp(max=most)
            rates = torch.where((weights > 0) & (gradients > 0), rates * local, rates)
        # multiples of gradients and weights are added to v and w in place, without copies
        buffers, decays = part.state["momentum_buffer"], list((rates * decay).unbind())
        shares = list((-rates if maximize else rates).unbind())
        foreach_mul_(buffers, momentum)
        foreach_addcmul_(buffers, part.gradients, shares)
        foreach_addcmul_(buffers, part.weights, decays)
        if nesterov:
            foreach_addcmul_(part.weights, part.weights, decays, value=-outer)
            foreach_addcmul_(part.weights, part.gradients, shares, value=-outer)
        foreach_add_(part.weights, buffers, alpha=-outer * (momentum if nesterov else 1.0))

"""LARS: SGD with momentum whose step is scaled, tensor by tensor, by the norms of weights and gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from trainers.optim.kernels import call
from trainers.optim.layerwise import Layerwise, Part


class LARS(Layerwise):
    """LARS (You et al. 2017, arXiv:1708.03888, algorithm 1); its variants are options.

        local = trust·‖w‖ / (‖g‖ + λ·‖w‖ + ε)      per tensor; 1 where a norm is 0
        v ← momentum·v + η·local·(g + λ·w)         w ← w − v

    Tuned Nesterov momentum has been found to do as well at the batches of LARS (Nado et al. 2021, arXiv:2102.06356).

    Args:
        params: parameters or groups; a group's ``trust=False`` makes ``local`` 1.
        lr: η.
        momentum: share of v that is kept.
        trust: the trust coefficient.
        weight_decay: λ.
        eps: ε; the paper has none, timm 1e-8.
        nesterov: w moves by the next step's share of v, too.
        scaled_momentum: False: v holds gradients, as in torch's SGD and timm, and not steps: w ← w − η·v.
        trust_clip: η·local becomes the smaller of local and η (LARC, and timm's ``trust_clip``).
        always_adapt: scale groups with ``trust=False``, too.
        maximize: ascend.
        native: use the C kernel for float32 on the CPU, where it can be built.

    Raises:
        ValueError: a number is out of its range.
        Refused: in ``step``: a gradient is sparse, or a parameter complex.
    """

    keeps = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 2e-4,
        *,
        eps: float = 0.0,
        nesterov: bool = False,
        scaled_momentum: bool = True,
        trust_clip: bool = False,
        always_adapt: bool = False,
        maximize: bool = False,
        native: bool = True,
    ) -> None:
        if not (lr >= 0 and trust > 0 and weight_decay >= 0 and eps >= 0 and 0 <= momentum < 1):
            raise ValueError(
                f"{lr=}, {weight_decay=} and {eps=} have to be 0 or more, {trust=} above 0, and {momentum=} in [0, 1)"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "coefficient": trust, "weight_decay": weight_decay, "eps": eps,
            "nesterov": nesterov, "scaled_momentum": scaled_momentum, "trust_clip": trust_clip,
            "always_adapt": always_adapt, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, native)

    def _update(self, group: dict[str, Any], part: Part) -> None:
        adapt, lr, momentum = group["trust"] or group["always_adapt"], float(group["lr"]), float(group["momentum"])
        decay, eps, trust = float(group["weight_decay"]), float(group["eps"]), float(group["coefficient"])
        most = math.inf
        if group["trust_clip"]:
            trust, most = trust / lr if lr else math.inf, 1.0
        inner, outer = (lr, 1.0) if group["scaled_momentum"] else (1.0, lr)
        buffers, nesterov, maximize = part.state["momentum_buffer"], group["nesterov"], group["maximize"]
        if part.native:
            numbers = (inner, outer, momentum, decay, trust, eps, most)
            call("lars", (part.weights, part.gradients, buffers), *numbers, adapt, nesterov, maximize)
            return
        rates = torch.full((len(buffers),), inner, device=buffers[0].device, dtype=buffers[0].dtype)
        if adapt:
            weights, gradients = part.norms(part.weights), part.norms(part.gradients)
            local = (trust * weights / (gradients + decay * weights + eps)).clamp(max=most)
            rates = torch.where((weights > 0) & (gradients > 0), rates * local, rates)
        shares = list((rates * (-1.0 if maximize else 1.0)).unbind())
        decays = list((rates * decay).unbind())
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_addcmul_(buffers, part.gradients, shares)
        torch._foreach_addcmul_(buffers, part.weights, decays)
        if nesterov:
            torch._foreach_addcmul_(part.weights, part.weights, decays, value=-outer)
            torch._foreach_addcmul_(part.weights, part.gradients, shares, value=-outer)
        torch._foreach_add_(part.weights, buffers, alpha=-outer * (momentum if nesterov else 1.0))

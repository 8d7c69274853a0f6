"""LAMB: Adam with each tensor's step scaled to the norm of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from isobatch.trainers.optim.kernels import call
from isobatch.trainers.optim.layerwise import Layerwise, Part
from isobatch.trainers.ranks.internals import foreach_add, foreach_addcmul_, fused_adamw_

ANY = (0.0, math.inf)
PAPER = {
    "bias_correction": True,  # "after": correct the step, but not u in the ratio (DeepSpeed); False: no correction
    "trust_clip": None,  # bounds of the ratio: (0, 1) is timm's ``trust_clip``, (0.01, 10) DeepSpeed's bounds
    "norm_clip": None,  # φ: bounds of ‖w‖ in the ratio; (0, 10) is torch_optimizer's ``clamp_value``
    "always_adapt": False,  # scale groups with ``trust=False``, too
    "maximize": False,  # ascend
}
"""The options in which implementations differ, with the values of the paper."""


class LAMB(Layerwise):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2); its variants are options.

        m ← β1·m + (1 − β1)·g            v ← β2·v + (1 − β2)·g²
        u = (m / (1 − β1ᵗ)) / (√(v / (1 − β2ᵗ)) + ε) + λ·w
        w ← w − η · φ(‖w‖)/‖u‖ · u       per tensor; the ratio is 1 where a norm is 0

    Tuned AdamW has been found to do as well at the batches of the paper (Nado et al. 2021, arXiv:2102.06356).

    Args:
        params: parameters or groups; a group's ``trust=False`` makes its ratio 1.
        lr: η.
        betas: β1, β2.
        eps: ε.
        weight_decay: λ.
        native: use the C kernel for float32 on the CPU, if it can be built.
        variant: options that differ from PAPER.

    Raises:
        ValueError: a number is out of its range.
        UserError: in ``step``, a gradient is sparse or a parameter complex.
    """

    keeps = ("exp_avg", "exp_avg_sq")
    counts = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        native: bool = True,
        **variant: Any,
    ) -> None:
        chosen = {**PAPER, **variant}
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"{lr=}, {eps=} and {weight_decay=} have to be 0 or more, and {betas=} in [0, 1)")
        if chosen["bias_correction"] not in (True, False, "after"):
            raise ValueError(f"bias_correction={chosen['bias_correction']!r} has to be True, False or 'after'")
        for name, clip in (("trust_clip", chosen["trust_clip"]), ("norm_clip", chosen["norm_clip"])):
            if clip is not None and not (len(clip) == 2 and 0 <= clip[0] <= clip[1]):
                raise ValueError(f"{name}={clip} has to be (least, most), or None")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **PAPER}, variant, native)

    def _update(self, group: dict[str, Any], part: Part) -> None:
        if not part.native:
            directions = _directions(group, part)
            rates = _rates(group, part, directions)
            foreach_addcmul_(part.weights, directions, list(rates.unbind()), value=-1)
            return
        lr, eps, decay = (float(group[key]) for key in ("lr", "eps", "weight_decay"))
        correction = {True: 1, False: 0, "after": 2}[group["bias_correction"]]
        bounds = map(float, (*(group["norm_clip"] or ANY), *(group["trust_clip"] or ANY)))
        moments = (part.state["exp_avg"], part.state["exp_avg_sq"])
        call(
            "lamb", (part.weights, part.gradients, *moments, part.state["step"]), lr, *map(float, group["betas"]), eps,
            decay, correction, _adapted(group), bool(group["maximize"]), *bounds,
        )  # fmt: skip


def _adapted(group: dict[str, Any]) -> bool:
    return bool(group["trust"] or group["always_adapt"])


def _rates(group: dict[str, Any], part: Part, directions: list[Tensor]) -> Tensor:
    """Return each tensor's factor on its u: η times the ratio, and the bias correction if u has none."""
    steps, like = torch.stack(part.state["step"]), part.weights[0]
    rates = torch.full_like(steps, group["lr"], dtype=like.dtype)
    if _adapted(group):
        weights, updates = part.norms(part.weights), part.norms(directions)
        ratios = weights.clamp(*(group["norm_clip"] or ANY)) / updates
        ratios = ratios.clamp(*(group["trust_clip"] or ANY))
        rates = torch.where((weights > 0) & (updates > 0), rates * ratios, rates)
    if group["bias_correction"] == "after":
        (beta1, beta2), counted = group["betas"], steps.double()
        rates = (rates * (1 - beta2**counted).sqrt() / (1 - beta1**counted)).to(like.dtype)
    return rates


def _directions(group: dict[str, Any], part: Part) -> list[Tensor]:
    """Return u of each tensor and update the moments with torch's fused AdamW.

    With η = −1 and a decay of λ − 1, AdamW's step turns w into u. Infinitely many steps turn its bias correction off.
    """
    (beta1, beta2), steps = group["betas"], part.state["step"]
    if group["bias_correction"] is not True:
        steps = list(foreach_add(steps, math.inf))
    directions = [weights.clone() for weights in part.weights]
    fused_adamw_(
        directions, part.gradients, part.state["exp_avg"], part.state["exp_avg_sq"], [], steps, lr=-1.0, beta1=beta1,
        beta2=beta2, weight_decay=group["weight_decay"] - 1, eps=group["eps"], amsgrad=False,
        maximize=group["maximize"],
    )  # fmt: skip
    return directions

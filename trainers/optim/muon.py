"""Combine torch's Muon for a model's inner matrices and torch's AdamW for everything else into one optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from isobatch.scaling.errors import UserError
from isobatch.trainers.optim.groups import gains_and_biases
from isobatch.trainers.optim.make import fused
from isobatch.trainers.tensors.sharding import gathered, keep, sharded


class MuonAdamW(Optimizer):
    """torch's Muon for groups with ``muon=True``, torch's AdamW for the others, at one learning rate.

    Muon's step is scaled to the size of AdamW's, 0.2·√(longer side) (Liu et al. 2025, arXiv:2502.16982), so that one
    learning rate fits both.

    Args:
        groups: parameter groups, each with ``muon``, a bool.
        lr, weight_decay: for both optimizers.
        momentum, nesterov: for Muon.
        betas, eps: for AdamW.

    Raises:
        UserError: a parameter of a group with ``muon=True`` isn't a matrix.
        ValueError: torch's optimizers reject a number.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        groups = list(groups)
        for shape in (list(p.shape) for group in groups if group["muon"] for p in group["params"] if p.ndim != 2):
            raise UserError(f"Muon needs matrices, but a group with muon=True has a parameter of shape {shape}")
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        inner, rest = ([group for group in self.param_groups if group["muon"] is muon] for muon in (True, False))
        # Muon and AdamW share the groups with this optimizer, and add their other hyperparameters to them.
        self._parts: dict[bool, Optimizer] = {}
        if inner:
            self._parts[True] = Muon(inner, lr, weight_decay, momentum, nesterov, adjust_lr_fn="match_rms_adamw")
        if rest:
            args = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            self._parts[False] = fused(AdamW, rest, args)

    @staticmethod
    def regroup(
        groups: list[dict[str, Any]], model: nn.Module, kept: list[dict[str, Any]] | None
    ) -> list[dict[str, Any]]:
        """Split each group that doesn't set ``muon`` into Muon's matrices and the other parameters.

        Args:
            kept: the groups of a checkpoint, which say which matrices are Muon's; None takes the inner matrices.
        """
        if kept is None:
            matrices = inner_matrices(model)
        else:
            matrices = {parameter for group in kept if group.get("muon") for parameter in group["params"]}
        found = []
        for group in groups:
            if "muon" in group:
                found.append({**group, "muon": bool(group["muon"])})
                continue
            inner = [parameter for parameter in group["params"] if parameter in matrices]
            rest = [parameter for parameter in group["params"] if parameter not in matrices]
            found += [{**group, "params": own, "muon": muon} for muon, own in ((True, inner), (False, rest)) if own]
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one update, and return the result of ``closure``, if given."""
        loss = torch.enable_grad()(closure)() if closure else None
        for muon, part in self._parts.items():
            groups = [group for group in self.param_groups if group["muon"] is muon]
            if muon and any(sharded(matrix) for group in groups for matrix in group["params"]):
                for group in groups:
                    for matrix in group["params"]:
                        self._step_whole(part, group, matrix)
                continue
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss

    def _step_whole(self, part: Optimizer, group: dict[str, Any], matrix: Tensor) -> None:
        """Gather a sharded matrix for Muon's step: DTensor would round its products to bf16 per shard."""
        if matrix.grad is None:
            return
        whole, state = nn.Parameter(gathered(matrix)), self.state[matrix]
        whole.grad = gathered(matrix.grad)
        part.param_groups = [{**group, "params": [whole]}]
        part.state = defaultdict(dict, {whole: {key: gathered(value) for key, value in state.items()}})
        part.step()
        keep(matrix, whole)
        for key, value in part.state[whole].items():
            keep(state.setdefault(key, torch.zeros_like(matrix, requires_grad=False)), value)


def inner_matrices(model: nn.Module) -> set[Tensor]:
    """Return the matrices that Muon updates.

    AdamW updates embeddings and the last ``nn.Linear`` that the model registers, usually its head, as Muon's author
    advises (https://kellerjordan.github.io/posts/muon/). It also updates gains and biases of two dimensions.
    """
    modules = list(model.modules())
    embeddings = [module for module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    head = [module for module in modules if isinstance(module, nn.Linear)][-1:]
    outer: set[Tensor] = {parameter for module in (*embeddings, *head) for parameter in module.parameters()}
    outer.update(gains_and_biases(model))
    return {parameter for parameter in model.parameters() if parameter.ndim == 2 and parameter not in outer}

"""Measure gradients in the norm of the optimizer in use, from its state before the step.

With v the second moment of Adam, M the momentum of a Muon matrix of m × n, and floors against directions that the
optimizer has hardly seen, the squared norms are

    raw      |g|²
    Adam     |Dg|², D = 1/(√v̂ + f), f = 0.01 √(mean of v̂ over the model)
    Muon     ⟨g, 0.2 √max(m, n) (MMᵀ)^(-½) g⟩: the squared dual norm, whose value at M is its nuclear norm;
             of the parameters that AdamW steps, ⟨g, Dg⟩

One floor for the whole model doesn't depend on how tensors are sharded or flattened. Muon's norm adds both kinds of
parameters up: each term is what a step at rate 1 gains to first order, ⟨g, step⟩ (match_rms_adamw scales it by 0.2 …).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isobatch.scaling.noise import Norm
from isobatch.trainers.engines.reducer import Owner, Reducer
from isobatch.trainers.ranks.world import real_view
from isobatch.trainers.tensors.sharding import local, sharded

FLOOR = 0.01  # of the root mean square of √v̂, or of a matrix's singular values

Weigh = Callable[[Tensor], Tensor]
"""Apply the norm's symmetric matrix Q to a gradient; the squared norm is ⟨g, Qg⟩."""


@dataclass(frozen=True, slots=True)
class Weighing:
    """Hold a norm, and its matrix for each of the reducer's gradients."""

    norm: Norm
    each: Iterator[Weigh]


def weighing_of(reducer: Reducer) -> Weighing | None:
    """Return the norm of the reducer's optimizer; None before its first step, if the norm needs its state.

    All ranks call it, since sharded state is summed over ranks.
    """
    owners, name = reducer.states(), type(reducer.tuned.optimizer).__name__
    muon = [bool(owner.group.get("muon")) for owner in owners]
    adam = [len(owner.group.get("betas", ())) == 2 and not inner for owner, inner in zip(owners, muon, strict=True)]
    if not all(one or other for one, other in zip(adam, muon, strict=True)):
        return _raw(len(owners), "" if name in ("SGD", "LARS") else f", since {name} isn't known to precondition them")
    if not all(owner.state for owner in owners):
        return None
    if any("exp_avg_sq" not in owner.state or "step" not in owner.state for owner in _those(owners, adam)):
        return _raw(len(owners), f", since {name} keeps no second moment of each element")
    if any("momentum_buffer" not in owner.state for owner in _those(owners, muon)):
        return _raw(len(owners), f", since {name} keeps no momentum")
    if any(sharded(owner.state["momentum_buffer"]) for owner in _those(owners, muon)):
        return _raw(len(owners), ", since Muon's matrices are sharded")
    floor, power = _floor(reducer, owners, adam), 1 if any(muon) else 2

    def each() -> Iterator[Weigh]:
        for owner, inner in zip(owners, muon, strict=True):
            yield _muon(owner) if inner else _adam(owner, floor, power)

    if any(muon):
        return Weighing(Norm("muon", f"in the dual norm of {name}'s steps"), each())
    return Weighing(Norm("adam", f"preconditioned by the second moment of {name}"), each())


def _raw(count: int, why: str) -> Weighing:
    return Weighing(Norm("raw", f"in the raw norm of gradients{why}"), iter([lambda gradient: gradient] * count))


def _those(owners: Sequence[Owner], chosen: Sequence[bool]) -> Iterator[Owner]:
    return (owner for owner, one in zip(owners, chosen, strict=True) if one)


def _second_moment(owner: Owner) -> Tensor:
    """Return v̂ = v / (1 − β₂^t), this rank's part."""
    moment, beta, steps = real_view(local(owner.state["exp_avg_sq"])), owner.group["betas"][1], owner.state["step"]
    steps = float(steps) if not isinstance(steps, Tensor) or steps.is_cpu else local(steps)  # without waiting
    wide: Any = moment.float() if moment.dtype.itemsize < 4 else moment
    return wide / (1 - beta**steps)  # type: ignore[no-any-return]


def _floor(reducer: Reducer, owners: Sequence[Owner], adam: Sequence[bool]) -> Tensor:
    """Return the floor of √v̂ in the whole model, 0-dim float64."""
    rows = []
    for owner, one in zip(owners, adam, strict=True):
        moment = _second_moment(owner) if one else torch.zeros(())
        total = moment.sum(dtype=torch.float64)
        rows.append(torch.stack((total, torch.full_like(total, owner.elements if one else 0))))
    device = next((row.device for row, one in zip(rows, adam, strict=True) if one), torch.device("cpu"))
    total, elements = reducer.total_of(torch.stack([row.to(device) for row in rows], 1)).unbind()
    return FLOOR * (total / elements.clamp(min=1)).sqrt()


def _adam(owner: Owner, floor: Tensor, power: int) -> Weigh:
    scale = _second_moment(owner).sqrt()
    scale = scale + floor.to(scale)
    scale = scale.square() if power == 2 else scale
    return lambda gradient: gradient / scale.view(gradient.shape)


def _muon(owner: Owner) -> Weigh:
    momentum = owner.state["momentum_buffer"]
    momentum = momentum.float() if momentum.dtype.itemsize < 4 else momentum
    rows, columns = momentum.shape
    left = rows <= columns
    values, vectors = torch.linalg.eigh(momentum @ momentum.T if left else momentum.T @ momentum)
    values = values.clamp(min=0)
    sizes = values.sqrt() + FLOOR * values.mean().sqrt()
    root = (vectors / sizes) @ vectors.T * (0.2 * max(rows, columns) ** 0.5)
    return (lambda gradient: root @ gradient) if left else (lambda gradient: gradient @ root)

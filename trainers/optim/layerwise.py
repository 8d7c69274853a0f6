"""The base of LAMB and LARS, which scale each tensor's step by norms of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from isobatch.scaling.errors import UserError
from isobatch.trainers.optim.kernels import kernels
from isobatch.trainers.ranks.internals import foreach_add_, foreach_norm
from isobatch.trainers.tensors.sharding import local, sharded

LARGE = 10_000  # elements


@dataclass(slots=True)
class Part:
    """Parameters of one group that are updated together: local, dense tensors of one device and dtype.

    Attributes:
        native: the C kernel may update them.
        owners: the parameters.
        weights: the parameters' values, or copies in at least float32.
        state: key → the state of each parameter.
        copies: (original, copy) pairs to copy back after the update.
    """

    native: bool
    owners: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """Return the norm of each tensor, over all shards if its parameter is a DTensor."""
        norms = foreach_norm(tensors)
        return torch.stack([_whole_norm(norm, owner) for norm, owner in zip(norms, self.owners, strict=True)])


class Layerwise(Optimizer):
    """Keep state and compute updates in at least float32; groups with ``trust=False`` aren't scaled.

    Args:
        defaults: hyperparameters, by name; ``variant`` replaces some.
        native: use the C kernel for float32 on the CPU, if it can be built.

    Raises:
        TypeError: ``variant`` has unknown names.
        UserError: in ``step``, a gradient is sparse or a parameter complex.
    """

    keeps: tuple[str, ...]
    """The keys of a parameter's state tensors, which have the parameter's shape."""

    counts = False
    """Whether the state also has the ``step`` of each parameter."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], variant: dict[str, Any], native: bool) -> None:
        if unknown := variant.keys() - defaults.keys():
            known = ", ".join((*defaults, "native"))
            raise TypeError(f"{type(self).__name__} takes no {' and no '.join(sorted(unknown))}; it takes {known}")
        # fused: the step counts are on the device
        super().__init__(params, {**defaults, **variant, "trust": True, "fused": True})
        self._on_cpu = any(parameter.is_cpu for group in self.param_groups for parameter in group["params"])
        self._native = native and self._on_cpu and kernels() is not None

    @staticmethod
    def regroup(groups: list[dict[str, Any]], model: nn.Module, kept: object) -> list[dict[str, Any]]:
        """Add ``trust`` to groups that don't set it: False for groups without weight decay, else True."""
        return [{"trust": group.get("weight_decay") != 0, **group} for group in groups]

    def agree(self) -> None:
        """Use the C kernel only if all ranks have it: replicas that round differently diverge. Called by all ranks."""
        if self._on_cpu and dist.is_available() and dist.is_initialized():
            available = torch.tensor(int(self._native))
            dist.all_reduce(available, dist.ReduceOp.MIN)
            self._native = bool(available)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one update, and return the result of ``closure``, if given."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for part in self._parts(group):
                if self.counts:
                    foreach_add_(part.state["step"], 1)
                self._update(group, part)
                for original, copy in part.copies:
                    original.copy_(copy)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state without torch's cast to the parameters' dtype."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key in self.keeps if index in state_dict["state"] else ():
                self.state[parameter][key] = _zeros(parameter).copy_(state_dict["state"][index][key])

    def _update(self, group: dict[str, Any], part: Part) -> None:
        raise NotImplementedError

    def _parts(self, group: dict[str, Any]) -> Iterator[Part]:
        parts: dict[Any, Part] = {}
        for parameter in group["params"]:
            if parameter.grad is None or parameter.numel() == 0:
                continue
            self._check(parameter)
            wide = _wide(parameter.dtype)
            native = self._native and wide == torch.float32 and parameter.is_cpu and not sharded(parameter)
            # torch's operations on a CPU update large parameters one by one, while their data is in the cache
            alone = id(parameter) if parameter.is_cpu and not native and parameter.numel() > LARGE else None
            part = parts.setdefault((parameter.device, wide, native, alone), Part(native))
            self._add(parameter, part, wide)
        yield from parts.values()

    def _add(self, parameter: Tensor, part: Part, wide: torch.dtype) -> None:
        state = self.state[parameter]
        if not state:
            if self.counts:
                state["step"] = torch.zeros((), device=parameter.device)
            for key in self.keeps:
                state[key] = _zeros(parameter)
        own = local(parameter)
        strides = own.stride() if own.is_contiguous() else torch.empty_like(own).stride()
        part.owners.append(parameter)
        kept = [(local(state[key]), part.state.setdefault(key, [])) for key in self.keeps]
        for original, tensors in ((own, part.weights), *kept):
            tensors.append(_as(original, strides, wide))
            if tensors[-1] is not original:
                part.copies.append((original, tensors[-1]))
        assert parameter.grad is not None
        part.gradients.append(_as(local(parameter.grad), strides, wide))
        if self.counts:
            part.state.setdefault("step", []).append(state["step"])

    def _check(self, parameter: Tensor) -> None:
        name, shape = type(self).__name__, list(parameter.shape)
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            problem = f"{name} needs dense gradients, but the gradient of a parameter of shape {shape} is sparse"
            other = "optimizer=custom optimizer._target_=torch.optim.SparseAdam"
            raise UserError(problem, f"give its nn.Embedding sparse=False, or use {other}")
        if parameter.is_complex():
            raise UserError(f"{name} takes no complex parameters, but one of shape {shape} is complex")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=_wide(parameter.dtype), requires_grad=False)


def _as(tensor: Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` if it has these strides and this dtype already, else a copy."""
    if tensor.dtype == dtype and tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device).copy_(tensor)


def _whole_norm(norm: Tensor, owner: Any) -> Tensor:
    if not sharded(owner):
        return norm
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Partial() if placement.is_shard() else Replicate() for placement in owner.placements]
    return DTensor.from_local(norm.square(), owner.device_mesh, parts, run_check=False).full_tensor().sqrt()

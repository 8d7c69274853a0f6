"""torch's FSDP2 (``fully_shard``) behind the protocol: each rank holds a part of every tensor, its rows.

A forward gathers the weights of one group of modules after another, a backward parts its gradients. What FSDP doesn't
reduce (notes, statistics, parameters without dimensions) travels with the norm of the gradient, which is a message
anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.base import Base
from isobatch.trainers.engines.engine import Found, Parts
from isobatch.trainers.engines.gradients import gradient_of, norm_of, number
from isobatch.trainers.engines.noise import GradientSquares
from isobatch.trainers.engines.step_report import Number, Total
from isobatch.trainers.model.build import is_called, matching, place_buffers
from isobatch.trainers.model.precision import DTYPES
from isobatch.trainers.model.targets import check_call
from isobatch.trainers.ranks.trails import BACKWARD, Trail
from isobatch.trainers.tensors.sharding import sharded

if TYPE_CHECKING:
    import isobatch.conf.groups


class FSDP(Base):
    """The engine ``fsdp``. Gradients are sums over ranks."""

    lockstep = True
    for_all_ranks = "engine=ddp, engine.shard=[], or engine.shard with modules that all ranks call"

    def __init__(self, parts: Parts, config: isobatch.conf.groups.FSDP) -> None:
        if config.offload and parts.world.device.type == "cpu":
            raise UserError("engine.offload=true moves what a GPU holds to the host's memory, and this runs on the CPU")
        parts.world.connect()
        super().__init__(parts)
        self._shard(config)
        self._begin(parts.make_optimizer())
        self._replicated = [p for p in self._parameters if not sharded(p)]
        self._norm_found: Tensor | None = None
        self._seen_unsharded()

    def _place(self, model: nn.Module) -> None:
        """The parts alone are brought to the device, group by group; what isn't parted goes there whole."""
        place_buffers(model, self._device)
        for parameter in model.parameters():
            self._world.share(parameter.data)  # the same on all ranks, as DDP makes it
            # FSDP takes no others
            parameter.data = parameter.data.contiguous() if partable(parameter) else parameter.data.to(self._device)

    def _shard(self, config: isobatch.conf.groups.FSDP) -> None:
        mesh = init_device_mesh(self._device.type, (self._world.size,))
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": _policy(config),
            "offload_policy": CPUOffloadPolicy() if config.offload else OffloadPolicy(),
            "ignored_params": {p for p in self.model.parameters() if not partable(p)},
        }
        check_call("engine.config", "fully_shard", fully_shard, (self._root,), {**options, **config.config})
        chosen = (*groups(self.model, config.shard), self._root)
        refuse_mixed(chosen)
        for module in chosen:
            fully_shard(module, **{**options, **config.config})  # type: ignore[call-overload]
        for one in self._sharded_modules():
            one.set_force_sum_reduction_for_comms(True)  # gloo has no mean
            if self._world.size > 1:  # by 1 it would divide, too
                one.set_gradient_divide_factor(1.0)
            one.set_reduce_scatter_unused_params(True, recurse=False)
        if self._lockstep:
            self._record(self._lockstep.trail)

    def _record(self, trail: Trail) -> None:
        """Record each message in which weights are gathered, or gradients reduced."""
        for name, module in self.model.named_modules(prefix=""):
            if isinstance(module, FSDPModule):
                _record(module, trail, name or "the model")
        assert isinstance(self._root, FSDPModule)
        _record(self._root, trail, "the rest of the model")

    def _sharded_modules(self) -> list[FSDPModule]:
        return [module for module in self._root.modules() if isinstance(module, FSDPModule)]

    def _seen_unsharded(self) -> None:
        """From the first forward on, measure the gradients of whole parameters: parts get theirs reduced."""
        found, hooks = list[nn.Parameter](), list[Any]()
        trained = {p for p in self._replicated if p.requires_grad}

        def look(module: nn.Module, args: Any) -> None:
            found.extend(p for p in module.parameters() if p.requires_grad and not sharded(p) and p not in trained)

        def done(module: nn.Module, args: Any, output: Any) -> None:
            self._squares = GradientSquares([*trained, *dict.fromkeys(found)])
            for hook in hooks:
                hook.remove()

        for module in self._sharded_modules():
            assert isinstance(module, nn.Module)
            hooks.append(module.register_forward_pre_hook(look))
        hooks.append(self._root.register_forward_hook(done))

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self._root, FSDPModule)
        self._root.set_is_last_backward(last)
        return super().micro(cut, last)

    def _forward(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor]:
        loss, units = super()._forward(batch, samples)
        return loss if loss._base is None else loss.clone(), units  # FSDP warns of a view

    def call(self, work: Callable[[], Found]) -> Found:
        try:
            with self._lockstep.evaluating() if self._lockstep else nullcontext():
                return self._wrapped(work)  # type: ignore[no-any-return]
        finally:
            for module in self._sharded_modules():
                module.reshard()  # else what was gathered is used again, whatever becomes of the parts

    def total(self, expected_units: int) -> Total:
        """One message: the notes, the statistics, gradients that FSDP left alone, and the norm of the rest."""
        gradients = self._gradients()
        own = [g for g, p in zip(gradients, self._parameters, strict=True) if sharded(p)]
        square = norm_of(own).to(self._device).square() if own else torch.zeros((), device=self._device)
        apart = [gradient_of(parameter) for parameter in self._replicated]
        square = self._all_summed(square, *apart)
        self._norm_found = (square + (norm_of(apart).square() if apart else 0)).sqrt()
        return super().total(expected_units)

    def _norm(self) -> Number:
        found, self._norm_found = self._norm_found, None
        assert found is not None, "no total since the last update"
        return number(found)


class Gather(DefaultAllGather):
    """Record the message."""

    def __init__(self, trail: Trail, name: str) -> None:
        self._trail, self._name = trail, name

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._trail.ran(self._name)
        return super().__call__(*args, **keywords)


class Reduce(DefaultReduceScatter):
    """Record the message."""

    def __init__(self, trail: Trail, name: str) -> None:
        self._trail, self._name = trail, name + BACKWARD

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._trail.ran(self._name)
        return super().__call__(*args, **keywords)


def _record(module: FSDPModule, trail: Trail, name: str) -> None:
    module.set_custom_all_gather(Gather(trail, name))
    module.set_custom_reduce_scatter(Reduce(trail, name))


def _policy(config: isobatch.conf.groups.FSDP) -> MixedPrecisionPolicy:
    wide = DTYPES | {None: None, "fp32": torch.float32}
    dtype = wide[config.param_dtype]
    reduced = torch.float32 if dtype and config.reduce_dtype is None else wide[config.reduce_dtype]
    # inputs are cast by autocast, which knows what may be
    return MixedPrecisionPolicy(dtype, reduced, cast_forward_inputs=False)


def groups(model: nn.Module, shard: Any) -> list[nn.Module]:
    """The modules whose parameters are gathered together, inner ones first; what is left goes with the root.

    Args:
        shard: patterns of their names; ``auto``: the elements of the outermost ModuleLists.

    Raises:
        UserError: a pattern matches none, or one of them shares a parameter with what is outside of it.
    """
    chosen = set(_elements(model) if shard == "auto" else matching(model, shard, "engine.shard").values())
    inner_first = [module for module in reversed(list(model.modules())) if module in chosen]
    owners: dict[nn.Parameter, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(id(module))
    apart = []
    for module in inner_first:
        inside = {id(one) for one in module.modules()}
        shared = any(not owners[parameter] <= inside for parameter in module.parameters())
        if shared and shard != "auto":
            name = next(name for name, one in model.named_modules() if one is module)
            raise UserError(
                f"engine.shard: {name} shares a parameter with a module outside of it, so it can't be apart"
            )
        if not shared and any(map(partable, module.parameters())):
            apart.append(module)
    return apart


def refuse_mixed(modules: Iterable[nn.Module]) -> None:
    """Raises UserError where a group's gradients, which are reduced as one, have several dtypes."""
    seen = set[nn.Parameter]()
    for module in modules:
        own = [p for p in module.parameters() if p.requires_grad and partable(p) and p not in seen]
        seen.update(own)
        if len(dtypes := sorted({str(p.dtype) for p in own})) > 1:
            raise UserError(
                f"engine=fsdp reduces the gradients of a group of modules as one, and those of a "
                f"{type(module).__name__} are {' and '.join(dtypes)}: part them by engine.shard, or use engine=ddp"
            )


def partable(parameter: Tensor) -> bool:
    """Whether FSDP takes it: what has no dimensions, or no elements, all ranks have whole."""
    return parameter.ndim > 0 and parameter.numel() > 0


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """Those of the outermost ModuleLists that are called themselves."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and is_called(child):
            yield child
        else:
            yield from _elements(child)

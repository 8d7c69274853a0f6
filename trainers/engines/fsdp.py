"""Reduce gradients by torch's FSDP2 (``fully_shard``): each rank holds a part of every tensor, its rows.

A forward gathers the weights of one group of modules after another, a backward parts its gradients. What FSDP doesn't
reduce (notes, statistics, parameters without dimensions) travels with the norm of the gradient, which is a message
anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from isobatch.conf import engines
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.lockstep import Lockstep
from isobatch.trainers.engines.reducer import Found, Parts, Reducer, Root, norm_of, number
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.model.build import is_called, matching, place_buffers
from isobatch.trainers.model.precision import DTYPES
from isobatch.trainers.ranks.trails import BACKWARD, Trail
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.sharding import sharded

INSTEAD = "engine=ddp, engine.shard=[], or engine.shard with modules that all ranks call"


class FSDP(Reducer):
    """Gradients are sums over ranks; each rank steps its parts."""

    lockstep = True

    def __init__(self, parts: Parts, config: RunConfig) -> None:
        world = parts.world
        assert isinstance(config.engine, engines.FSDP)
        world.connect()
        place(parts.model, world)
        self._device = world.device
        root = shard(parts.root, config.engine, world)
        if world.size > 1:
            self.trails = Lockstep(world, INSTEAD)
            record(root, self.trails.trail)
        super().__init__(parts, parts.make_optimizer(), root)
        self._replicated = [p for p in self.parameters if not sharded(p)]
        self.observed = self._replicated
        self._observe_unsharded(root)

    def _observe_unsharded(self, root: Root) -> None:
        """From the first forward on, observe the gradients of whole parameters: parts get theirs reduced."""
        found, hooks = list[nn.Parameter](), list[Any]()
        trained = {p for p in self._replicated if p.requires_grad}

        def look(module: nn.Module, args: Any) -> None:
            found.extend(p for p in module.parameters() if p.requires_grad and not sharded(p) and p not in trained)

        def done(module: nn.Module, args: Any, output: Any) -> None:
            self.observed = [*trained, *dict.fromkeys(found)]
            for hook in hooks:
                hook.remove()

        hooks.extend(module.register_forward_pre_hook(look) for module in sharded_modules(root))
        hooks.append(root.register_forward_hook(done))

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self._root, FSDPModule)
        self._root.set_is_last_backward(last)
        return self.trails.trail.begin("training") if self.trails else nullcontext()

    def forward(self, work: Callable[[], Any]) -> Any:
        def no_view() -> tuple[Tensor, float | Tensor]:
            loss, units = work()
            return loss if loss._base is None else loss.clone(), units  # FSDP warns of a view

        return self._root(no_view)

    def call(self, work: Callable[[], Found]) -> Found:
        try:
            return self._root(work)  # type: ignore[no-any-return]
        finally:
            for module in sharded_modules(self._root):
                module.reshard()  # else what was gathered is used again, whatever becomes of the parts

    def reduce(self) -> Number:
        """One message: the notes, the statistics, gradients that FSDP left alone, and the norm of the rest."""
        own = [held for held, parameter in zip(self.held(), self.parameters, strict=True) if sharded(parameter)]
        square = norm_of(own).to(self._device).square() if own else torch.zeros((), device=self._device)
        apart: list[Any] = [parameter.grad for parameter in self._replicated]
        square = self._riders.total(square, *apart, *(self.trails.ride() if self.trails else ()))
        return number((square + (norm_of(apart).square() if apart else 0)).sqrt())

    def explain(self, text: str) -> UserError | None:
        if "mixed torch.Tensor and DTensor" in text:
            how = "is used otherwise, by another method or its weight alone"
            fix = "name modules that are only called, engine.shard=[…], or none of them, engine.shard=[]"
            return UserError(f"a module whose weights are gathered when it is called {how}", fix, "engine.shard")
        return super().explain(text)


make_reducer = FSDP


def place(model: nn.Module, world: World) -> None:
    """Bring to the device what isn't parted; the parts alone follow, group by group."""
    place_buffers(model, world.device)
    for parameter in model.parameters():
        world.share(parameter.data)  # the same on all ranks, as DDP makes it
        # FSDP takes no others
        parameter.data = parameter.data.contiguous() if partable(parameter) else parameter.data.to(world.device)


def shard(root: Root, config: engines.FSDP, world: World) -> Root:
    """Part the model in ``root`` as ``config`` says, in place. Raises UserError where it can't be."""
    computed = DTYPES.get(config.param_dtype or "")
    reduced = DTYPES.get(config.reduce_dtype or "", torch.float32 if computed else None)
    options = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        # inputs are cast by autocast, which knows what may be
        "mp_policy": MixedPrecisionPolicy(computed, reduced, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if config.offload else OffloadPolicy(),
        "ignored_params": {p for p in root.parameters() if not partable(p)},
        **config.config,
    }
    chosen = (*groups(root.model, config.shard), root)
    refuse_mixed(chosen)
    for module in chosen:
        fully_shard(module, **options)  # type: ignore[call-overload]
    for one in sharded_modules(root):
        one.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        if world.size > 1:  # by 1 it would divide, too
            one.set_gradient_divide_factor(1.0)
        one.set_reduce_scatter_unused_params(True, recurse=False)
    return root


def sharded_modules(root: nn.Module) -> list[Any]:
    """Return the modules whose parameters are gathered together, ``root`` first."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def record(root: Root, trail: Trail) -> None:
    """Record each message in which weights are gathered, or gradients reduced."""
    names = {module: name or "the model" for name, module in root.model.named_modules()}
    for module in sharded_modules(root):
        name = names.get(module, "the rest of the model")
        module.set_custom_all_gather(Gather(trail, name))
        module.set_custom_reduce_scatter(Reduce(trail, name + BACKWARD))


class Recorded:
    """Record a message of FSDP's, before it is sent."""

    def __init__(self, trail: Trail, name: str) -> None:
        self._trail, self._name = trail, name

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._trail.ran(self._name)
        return super().__call__(*args, **keywords)  # type: ignore[misc]


class Gather(Recorded, DefaultAllGather): ...


class Reduce(Recorded, DefaultReduceScatter): ...


def groups(model: nn.Module, shard: Any) -> list[nn.Module]:
    """Return the modules whose parameters are gathered together, inner ones first; the rest goes with the root.

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
            problem = f"engine.shard: {name} shares a parameter with a module outside of it, so it can't be apart"
            raise UserError(problem, key="engine.shard", value=shard)
        if not shared and any(map(partable, module.parameters())):
            apart.append(module)
    return apart


def refuse_mixed(modules: Iterable[nn.Module]) -> None:
    """Raise UserError where a group's gradients, which are reduced as one, have several dtypes."""
    seen = set[nn.Parameter]()
    for module in modules:
        own = [p for p in module.parameters() if p.requires_grad and partable(p) and p not in seen]
        seen.update(own)
        if len(dtypes := sorted({str(p.dtype) for p in own})) > 1:
            those = f"those of a {type(module).__name__} are {' and '.join(dtypes)}"
            problem = f"engine=fsdp reduces the gradients of a group of modules as one, and {those}"
            raise UserError(problem, "part them by engine.shard, or use engine=ddp", "engine.shard")


def partable(parameter: Tensor) -> bool:
    """Return whether FSDP takes it: what has no dimensions, or no elements, all ranks have whole."""
    return parameter.ndim > 0 and parameter.numel() > 0


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """Those of the outermost ModuleLists that are called themselves."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and is_called(child):
            yield child
        else:
            yield from _elements(child)

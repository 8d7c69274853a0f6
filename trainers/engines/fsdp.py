"""Reduce gradients with torch's FSDP2 (``fully_shard``): each rank holds some rows of every tensor.

A forward gathers the weights of one group of modules after another, and a backward scatters their gradients. The notes,
the statistics and the gradients that FSDP doesn't reduce (of parameters without dimensions) are summed in the message
with the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from isobatch.conf import engines
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.lockstep import Lockstep
from isobatch.trainers.engines.reducer import Found, Parts, Reducer, Root, norm_of, number
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.model.build import is_called, matching, place_buffers
from isobatch.trainers.model.precision import DTYPES
from isobatch.trainers.ranks.internals import fsdp_collectives
from isobatch.trainers.ranks.trails import BACKWARD, Trail
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tensors.sharding import sharded

INSTEAD = "engine=ddp, engine.shard=[], or engine.shard with modules that all ranks call"


class FSDP(Reducer):
    """Sum gradients over ranks; each rank steps its shards of the parameters."""

    lockstep = True

    def __init__(self, parts: Parts, config: RunConfig) -> None:
        world = parts.world
        assert isinstance(config.engine, engines.FSDP)
        world.connect()
        place(parts.model, world)
        self._world, self._device = world, world.device
        root = shard(parts.root, config.engine, world)
        if world.size > 1:
            self.trails = Lockstep(world, INSTEAD)
            record(root, self.trails.trail)
        super().__init__(parts, parts.make_optimizer(), root)
        self._replicated = [p for p in self.parameters if not sharded(p)]
        self.observed = self._replicated
        self._observe_unsharded(root)

    def _observe_unsharded(self, root: Root) -> None:
        """Observe the unsharded parameters from the first forward on: shards only get reduced gradients."""
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
        def no_view() -> tuple[Any, ...]:
            loss, *rest = work()
            return loss if loss._base is None else loss.clone(), *rest  # FSDP warns of a view

        return self._root(no_view)

    def call(self, work: Callable[[], Found]) -> Found:
        try:
            return self._root(work)  # type: ignore[no-any-return]
        finally:
            for module in sharded_modules(self._root):
                module.reshard()  # else the gathered weights are reused after the shards have changed

    def reduce(self) -> Number:
        """Sum the notes, the statistics, the gradients that FSDP didn't reduce, and the squared norm in one message."""
        own = [held for held, parameter in zip(self.held(), self.parameters, strict=True) if sharded(parameter)]
        square = norm_of(own).to(self._device).square() if own else torch.zeros((), device=self._device)
        apart: list[Any] = [parameter.grad for parameter in self._replicated]
        square = self._riders.total(square, *apart, *(self.trails.ride() if self.trails else ()))
        return number((square + (norm_of(apart).square() if apart else 0)).sqrt())

    def norm(self) -> Number:
        squares = torch.stack([norm_of([held]).square() for held in self.held()])
        return number(self.total_of(squares[None])[0].sqrt())

    def total_of(self, parts: Tensor) -> Tensor:
        shards = torch.tensor([sharded(parameter) for parameter in self.parameters], device=parts.device)
        own = self._world.sum((parts * shards).sum(1).to(self._device))
        return own + (parts * ~shards).sum(1).to(self._device)

    def explain(self, text: str) -> UserError | None:
        if "mixed torch.Tensor and DTensor" in text:
            problem = "a sharded module is used without being called: by another method, or by its weight alone"
            fix = "name only modules that are called in engine.shard=[…], or use engine.shard=[]"
            return UserError(problem, fix, "engine.shard")
        return super().explain(text)


make_reducer = FSDP


def place(model: nn.Module, world: World) -> None:
    """Move buffers and unsharded parameters to the device; FSDP moves the shards, group by group."""
    place_buffers(model, world.device)
    for parameter in model.parameters():
        world.share(parameter.data)  # from rank 0, as DDP does
        # FSDP takes contiguous parameters only
        parameter.data = parameter.data.contiguous() if partable(parameter) else parameter.data.to(world.device)


def shard(root: Root, config: engines.FSDP, world: World) -> Root:
    """Shard the model in ``root`` in place as ``config`` says. Raise UserError if it can't be sharded so."""
    computed = DTYPES.get(config.param_dtype or "")
    reduced = DTYPES.get(config.reduce_dtype or "", torch.float32 if computed else None)
    options = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        # autocast casts inputs, and knows which ones to cast
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
        if world.size > 1:  # on one rank, FSDP would still divide by 1
            one.set_gradient_divide_factor(1.0)
        one.set_reduce_scatter_unused_params(True, recurse=False)
    return root


def sharded_modules(root: nn.Module) -> list[Any]:
    """Return the modules that FSDP shards as one group each, ``root`` first."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def record(root: Root, trail: Trail) -> None:
    """Record each message that gathers weights or reduces gradients."""
    names = {module: name or "the model" for name, module in root.model.named_modules()}
    for module in sharded_modules(root):
        name = names.get(module, "the rest of the model")
        module.set_custom_all_gather(Gather(trail, name))
        module.set_custom_reduce_scatter(Reduce(trail, name + BACKWARD))


class Recorded:
    """Record an FSDP message before it is sent."""

    def __init__(self, trail: Trail, name: str) -> None:
        self._trail, self._name = trail, name

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._trail.ran(self._name)
        return super().__call__(*args, **keywords)  # type: ignore[misc]


AllGather: Any
ReduceScatter: Any
AllGather, ReduceScatter = fsdp_collectives()


class Gather(Recorded, AllGather): ...  # type: ignore[misc]


class Reduce(Recorded, ReduceScatter): ...  # type: ignore[misc]


def groups(model: nn.Module, shard: Any) -> list[nn.Module]:
    """Return the modules to shard as one group each, inner ones first; other parameters belong to the root's group.

    Args:
        shard: patterns of module names; ``auto`` takes the elements of the outermost ModuleLists.

    Raises:
        UserError: a pattern matches no module, or a module shares a parameter with a module outside of it.
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
            problem = f"engine.shard: {name} shares a parameter with a module outside of it, so it can't be a group"
            raise UserError(problem, key="engine.shard", value=shard)
        if not shared and any(map(partable, module.parameters())):
            apart.append(module)
    return apart


def refuse_mixed(modules: Iterable[nn.Module]) -> None:
    """Raise UserError if the gradients of a group, which are reduced together, have several dtypes."""
    seen = set[nn.Parameter]()
    for module in modules:
        own = [p for p in module.parameters() if p.requires_grad and partable(p) and p not in seen]
        seen.update(own)
        if len(dtypes := sorted({str(p.dtype) for p in own})) > 1:
            found = f"a {type(module).__name__} has {' and '.join(dtypes)}"
            problem = f"engine=fsdp needs one dtype for the gradients of a group of modules, and {found}"
            raise UserError(problem, "split the group with engine.shard, or use engine=ddp", "engine.shard")


def partable(parameter: Tensor) -> bool:
    """Return whether FSDP can shard the parameter. One without dimensions or elements is whole on all ranks."""
    return parameter.ndim > 0 and parameter.numel() > 0


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of the outermost ModuleLists that have a forward."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and is_called(child):
            yield child
        else:
            yield from _elements(child)

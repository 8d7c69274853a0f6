"""DeepSpeed's own engine around a model and its optimizer; with it stage 0, at which all is whole on each rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.trainers.engines.deepspeed.setup import import_deepspeed, refuse_settings, settings_of
from isobatch.trainers.engines.gradients import Gradients
from isobatch.trainers.engines.reducer import OwnStorage, Parts
from isobatch.trainers.engines.root import Found, explain
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.model.batchnorm import settled
from isobatch.trainers.model.build import place_buffers
from isobatch.trainers.optim.make import Tuned
from isobatch.trainers.ranks.world import World

if TYPE_CHECKING:
    import isobatch.conf.groups


class Wrapper:
    """Place a model, make its optimizer, and let DeepSpeed wrap both, in place.

    Args:
        config: the engine's.

    Attributes:
        groups: the parameters of the optimizer's groups, before DeepSpeed made them flat.
        engine: DeepSpeed's.

    Raises:
        UserError: DeepSpeed isn't installed, or can't take the config, the model or the optimizer.
    """

    def __init__(self, parts: Parts, config: isobatch.conf.groups.DeepSpeed) -> None:
        world, model = parts.world, parts.model
        deepspeed = import_deepspeed(world.device)
        world.connect()
        settings = settings_of(config)
        refuse_settings(settings)
        place(model, world, config.stage)
        settings["zero_optimization"].setdefault("reduce_bucket_size", bucket_size(model))
        self.tuned = parts.make_optimizer()
        self.groups = [group["params"] for group in self.tuned.optimizer.param_groups]
        refuse_untrainable(model, self.tuned, config.stage)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it asks for it there
        if config.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        if config.stage == 0:
            parts.riders.ride_in(parts.root, world.size)
        self.engine = initialised(deepspeed, parts, self.tuned, settings)

    def call(self, work: Callable[[], Found]) -> Found:
        """Return what ``work`` returns, as it is: DeepSpeed would look into what a forward gives."""
        found = list[Found]()
        self.engine(lambda: found.append(work()))
        return found[0]

    def backward(self, loss: Tensor) -> None:
        """Run the backward of a pass."""
        self.engine.backward(loss, scale_wrt_gas=False)


class Replicated:
    """Stage 0: gradients are means over ranks, all else is whole on each."""

    lockstep, trails = False, None
    explain = staticmethod(explain)

    def __init__(self, parts: Parts, wrapper: Wrapper) -> None:
        self.mean_over, self.shares_buffers = parts.world.size, settled(parts.model)
        self.tuned, self.storage = wrapper.tuned, OwnStorage(parts.model)
        self._gradients = Gradients(self.tuned.optimizer)
        self.observed, self.reduce, self.drop = self._gradients.parameters, self._gradients.norm, self._gradients.drop
        self._engine, self.forward = wrapper.engine, wrapper.engine
        self.call, self.backward = wrapper.call, wrapper.backward

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def step(self, factor: Number) -> None:
        self._gradients.multiply(factor)
        self._engine.step()


def place(model: nn.Module, world: World, stage: int) -> None:
    """Bring the model to the device; at stage 3 parameters follow one by one, as they are parted."""
    if stage < 3:
        model.to(world.device)
    else:
        place_buffers(model, world.device)
    for parameter in model.parameters():  # DeepSpeed takes no others
        parameter.data = parameter.data.contiguous()


def initialised(deepspeed: Any, parts: Parts, tuned: Tuned, settings: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine."""
    scalars: list[Any] = [parameter for parameter in parts.model.parameters() if parameter.ndim == 0]
    for parameter in scalars:  # it can't share them
        parts.world.share(parameter.data)
        parameter.ds_optim_param = True
    try:
        engine, *_ = deepspeed.initialize(
            model=parts.root, optimizer=tuned.optimizer, config=settings, dist_init_required=False
        )
    finally:
        for parameter in scalars:
            del parameter.ds_optim_param
    parts.world.wait_patiently(engine.data_parallel_group)  # a group of its own
    return engine


def bucket_size(model: nn.Module) -> int:
    """Elements of the buffer in which gradients are reduced: DeepSpeed's own number, 2 GB, or as many as there are."""
    return min(500_000_000, sum(parameter.numel() for parameter in model.parameters()))


def refuse_untrainable(model: nn.Module, tuned: Tuned, stage: int) -> None:
    """Raise UserError for a model or an optimizer that DeepSpeed can't take."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            problem = f"{name} is {parameter.dtype}, and DeepSpeed steps in torch.float32"
            raise UserError(problem, "use engine=ddp or fsdp", key="engine")
        if stage == 3 and parameter.ndim == 0:
            problem = f"{name} has no dimensions, by which stage 3 could part it"
            raise UserError(problem, "use engine.stage=2, or engine=fsdp", key="engine.stage", value=3)
        if stage == 3 and parameter.numel() == 0:
            problem = f"{name} has no elements, and stage 3 takes no such parameter"
            raise UserError(problem, "use engine.stage=2, or engine=ddp", key="engine.stage", value=3)
    if stage and any(not any(p.requires_grad for p in group["params"]) for group in tuned.optimizer.param_groups):
        problem = "the optimizer has a group without a trained parameter, which DeepSpeed doesn't take"
        raise UserError(problem, "leave such groups out of task.param_groups")
    if stage and tuned.optimizer.state:
        problem = f"the optimizer {type(tuned.optimizer).__name__} keeps state from the start, which DeepSpeed drops"
        raise UserError(problem, "use engine=ddp", key="engine")

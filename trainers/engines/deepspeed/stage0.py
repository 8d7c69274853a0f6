"""Wrap a model and its optimizer in DeepSpeed's engine; on its own this is stage 0, which shards nothing."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from isobatch.conf import engines
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.scaling.planning.engine_config import PRECISIONS
from isobatch.trainers.engines.reducer import Found, Parts, Reducer, multiply
from isobatch.trainers.engines.step_report import Number
from isobatch.trainers.model.build import place_buffers
from isobatch.trainers.model.targets import import_engine_package
from isobatch.trainers.optim.make import Tuned
from isobatch.trainers.ranks.world import World

OURS = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # Isobatch clips by its factor on the gradient
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


class DeepSpeed(Reducer):
    """Average gradients over ranks; model and optimizer are replicated (stage 0).

    Raises:
        UserError: DeepSpeed isn't installed, or rejects the config, the model or the optimizer.
    """

    def __init__(self, parts: Parts, config: engines.DeepSpeed) -> None:
        world, model, self.mean_over = parts.world, parts.model, parts.world.size
        if world.device.index not in (None, world.local_rank):
            problem = f"local rank {world.local_rank} has {world.device}, and DeepSpeed takes a GPU of its own for each"
            raise UserError(problem, "use engine=ddp or fsdp, whose ranks can share a GPU", "cluster.backend", "gloo")
        deepspeed = import_deepspeed(world.device)
        world.connect()
        settings = settings_of(config)
        place(model, world, config.stage)
        elements = sum(parameter.numel() for parameter in model.parameters())  # DeepSpeed's default at most
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(500_000_000, elements))
        tuned = parts.make_optimizer()
        refuse_untrainable(model, tuned, config.stage)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it
        self._groups = [group["params"] for group in tuned.optimizer.param_groups]  # before DeepSpeed flattens them
        super().__init__(parts, tuned)
        if config.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        if config.stage == 0:
            parts.riders.ride_in(parts.root, world.size)
        self._engine = self._root = make_engine(deepspeed, parts, tuned, settings)

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def call(self, work: Callable[[], Found]) -> Found:
        results = list[Found]()  # DeepSpeed inspects what a forward returns, so return nothing to it
        self._engine(lambda: results.append(work()))
        return results[0]

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def reduce(self) -> Number:
        """Return the gradient's norm: DeepSpeed summed gradients and riders in the last backward."""
        return self.norm()

    def step(self, factor: Number) -> None:
        multiply(self.held(), factor)
        self._held = None
        self._engine.step()


def import_deepspeed(device: torch.device | None = None) -> Any:
    """Import DeepSpeed, with its warnings off, and set its device; None only imports it, for forked processes."""
    logger = logging.getLogger("DeepSpeed")
    logger.disabled = True  # DeepSpeed warns of every missing device
    try:
        deepspeed = import_engine_package("deepspeed")
    finally:
        logger.disabled = False
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that DeepSpeed still uses
    # an inference operator, which DeepSpeed would compile at its start on a CPU
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    if device and device.type == "cpu":
        cpu = import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator
        import_module("deepspeed.accelerator").set_accelerator(cpu())
    return deepspeed


def settings_of(config: engines.DeepSpeed) -> dict[str, Any]:
    """Return DeepSpeed's config: ``engine.config`` and Isobatch's settings, which it doesn't contradict.

    DeepSpeed only counts with its batch sizes: the plan decides the passes, and which is a step's last. Raise
    UserError if DeepSpeed rejects the config.
    """
    offload = {"offload_optimizer": {"device": "cpu"}} if config.offload else {}
    ours = {
        **OURS,
        "zero_optimization": {"stage": config.stage, **offload},
        **{section: {"enabled": False} for section in PRECISIONS if section in config.config},
    }
    settings = dict(_merged(config.config, ours))
    module = import_module("deepspeed.runtime.config")
    try:
        module.DeepSpeedConfig(dict(settings))
    except (AssertionError, KeyError, TypeError, ValueError, module.DeepSpeedConfigError) as error:
        errors = error.errors() if isinstance(error, ValidationError) else []
        reason = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in errors) or str(error)
        raise UserError(f"DeepSpeed rejects engine.config: {reason}", key="engine.config") from error
    return settings


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def place(model: nn.Module, world: World, stage: int) -> None:
    """Move the model to the device; stage 3 moves the parameters itself, one by one, as it shards them."""
    if stage < 3:
        model.to(world.device)
    else:
        place_buffers(model, world.device)
    for parameter in model.parameters():  # DeepSpeed takes contiguous parameters only
        parameter.data = parameter.data.contiguous()


def make_engine(deepspeed: Any, parts: Parts, tuned: Tuned, settings: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine around the model and its optimizer."""
    scalars: list[Any] = [parameter for parameter in parts.model.parameters() if parameter.ndim == 0]
    for parameter in scalars:  # DeepSpeed can't broadcast 0-dim parameters
        parts.world.share(parameter.data)
        parameter.ds_optim_param = True
    try:
        ours = {"model": parts.root, "optimizer": tuned.optimizer, "config": settings}
        engine, *_ = deepspeed.initialize(**ours, dist_init_required=False)
    finally:
        for parameter in scalars:
            del parameter.ds_optim_param
    parts.world.wait_patiently(engine.data_parallel_group)  # DeepSpeed makes its own group
    return engine


def refuse_untrainable(model: nn.Module, tuned: Tuned, stage: int) -> None:
    """Raise UserError for a model or an optimizer that DeepSpeed can't train."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            problem = f"{name} is {parameter.dtype}, but DeepSpeed steps in torch.float32"
            raise UserError(problem, "use engine=ddp or fsdp", key="engine")
        if stage == 3 and parameter.ndim == 0:
            problem = f"{name} has no dimensions, so stage 3 can't shard it"
            raise UserError(problem, "use engine.stage=2, or engine=fsdp", key="engine.stage", value=3)
        if stage == 3 and parameter.numel() == 0:
            problem = f"{name} has no elements, so stage 3 can't shard it"
            raise UserError(problem, "use engine.stage=2, or engine=ddp", key="engine.stage", value=3)
    if stage and any(not any(p.requires_grad for p in group["params"]) for group in tuned.optimizer.param_groups):
        problem = "the optimizer has a group without trained parameters, which DeepSpeed rejects"
        raise UserError(problem, "leave such groups out of task.param_groups")
    if stage and tuned.optimizer.state:
        problem = f"the optimizer {type(tuned.optimizer).__name__} keeps state from the start, which DeepSpeed drops"
        raise UserError(problem, "use engine=ddp", key="engine")

"""Reduce gradients with Hugging Face's Accelerate: its Accelerator wraps the model and runs the backward.

Options of `accelerate launch`, found in the environment, are rejected if they contradict the plan or ask for another
engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn

from torch import nn

from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.engine_config import ALLOWED
from isobatch.trainers.engines.ddp import DDP
from isobatch.trainers.engines.reducer import Parts, Reducer
from isobatch.trainers.model.targets import import_engine_package, made
from isobatch.trainers.ranks.world import World

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def make_reducer(parts: Parts, config: RunConfig) -> Reducer:
    """Return the reducer of the engine ``accelerate``: DDP that an Accelerator wraps and runs the backward of."""
    refuse_contradictions(os.environ, config.precision, config.compile, parts.world.device.type)
    accelerator = make_accelerator(parts.world, config.engine.config)

    def wrap(root: nn.Module, **defaults: Any) -> nn.Module:
        accelerator.ddp_handler = Keywords(accelerator.ddp_handler, defaults)
        wrapped: nn.Module = accelerator.prepare_model(root)
        return wrapped

    return DDP(parts, {}, wrap, accelerator.backward)


def preload(config: RunConfig) -> None:
    """Import the modules that the first step needs."""
    import_module("accelerate")


def refuse_environment(config: RunConfig, plan: Plan) -> None:
    """Raise UserError if ``accelerate launch`` asks for another accumulation than the plan's."""
    given = os.environ.get(ACCUMULATION, "1")
    planned = [str(number) for number in sorted({stage.cut.accumulation for stage in plan.stages})]
    if given not in ("1", "auto") and planned != [given]:
        problem = f"{ACCUMULATION}={given}, but the plan has batch.accumulation={', '.join(planned)}"
        raise UserError(problem, "set it to 1 or auto, or leave it out", "batch.accumulation")


class Keywords:
    """A DDP handler for the Accelerator that adds ``defaults`` to the keywords of the user's handler."""

    def __init__(self, users: Any | None, defaults: dict[str, Any]) -> None:
        self._keywords = {**defaults, **(users.to_kwargs() if users else {})}
        if "broadcast_buffers" in self._keywords:  # torch takes only one of the two
            self._keywords.pop("forward_sync_buffers", None)

    def to_kwargs(self) -> dict[str, Any]:
        return self._keywords

    def register_comm_hook(self, model: nn.Module) -> None:
        """Register no hook: they compress gradients, which changes the run."""


def make_accelerator(world: World, config: dict[str, Any]) -> Any:
    """Return an Accelerator for the ranks of ``world``. Raise UserError if it rejects ``config``."""
    accelerate = import_engine_package("accelerate")
    users = {key: made(f"engine.config.{key}", value) for key, value in config.items() if key in ALLOWED["accelerate"]}
    for handler in users.get("kwargs_handlers") or ():
        key, name = "engine.config.kwargs_handlers", type(handler).__name__
        if not isinstance(handler, accelerate.DistributedDataParallelKwargs):
            problem = f"{key} has a {name}, but only DistributedDataParallelKwargs has an effect"
            fix = "leave it out: precision sets dtypes and scaling, and Isobatch makes the process group"
            raise UserError(problem, fix, key)
        if str(handler.comm_hook) != "no":
            problem = f"{key}: comm_hook={handler.comm_hook} compresses gradients, which changes the run"
            raise UserError(problem, "leave it out", key)
    world.connect()  # Accelerate needs a process group on a single rank, too
    one_pass = accelerate.utils.GradientAccumulationPlugin(num_steps=1)  # not the environment, but the plan decides
    try:
        found = accelerate.Accelerator(
            **users, cpu=world.device.type == "cpu", mixed_precision="no", gradient_accumulation_plugin=one_pass,
            dynamo_backend="no",
        )  # fmt: skip
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"accelerate.Accelerator can't be made: {error}", key="engine.config", value=config) from error
    if found.num_processes != world.size or found.device.type != world.device.type:
        sees = f"{found.num_processes} processes on {found.device.type}"
        problem = f"accelerate sees {sees}, but Isobatch sees {world.size} on {world.device.type}"
        raise UserError(problem, "use engine=ddp, which reads less of the environment", "engine", "accelerate")
    return found


def refuse_contradictions(env: Mapping[str, str], precision: str, compiled: bool, device: str) -> None:
    """Raise UserError if the options or the config file of ``accelerate launch`` contradict the plan.

    Args:
        env: the environment variables, in which ``accelerate launch`` passes its options.
        device: the type of the training device.
    """

    def on(name: str) -> bool:
        return env.get(f"ACCELERATE_{name}", "").lower() in ("1", "true", "yes", "on")

    def refuse(option: str, fix: str) -> NoReturn:
        raise UserError(f"accelerate launch says {option}", fix)

    if on("USE_DEEPSPEED"):
        stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        refuse("use_deepspeed", f"give engine=deepspeed engine.stage={stage}")
    if on("USE_FSDP"):
        refuse("use_fsdp", _fsdp(env))
    if any(map(on, ("USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "IN_TPU_POD"))):
        refuse(
            "use_megatron_lm, use_parallelism_config or tpu, but runs are data-parallel, on CPUs and GPUs",
            "leave it out; engine=fsdp and engine=deepspeed shard a model over ranks",
        )
    if on("USE_CPU") and device != "cpu":
        refuse(f"cpu, but device={device}", "give device=cpu, or leave out cpu in Accelerate's config")
    wanted = env.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" is also the launcher's default
    if wanted not in ("no", precision):
        instead = f"precision={wanted}" if wanted in ("bf16", "fp16") else "precision=bf16 instead"
        refuse(f"mixed_precision={wanted}, but precision={precision}", f"give {instead}")
    backend, mode = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(), env.get("ACCELERATE_DYNAMO_MODE", "default")
    if backend != "no" and (not compiled or backend != "inductor" or mode != "default"):
        refuse(
            f"dynamo_backend={backend} (dynamo_mode={mode}), but compile={str(compiled).lower()}",
            "give compile=true, which uses inductor in its default mode, and leave Accelerate's dynamo options out",
        )


def _fsdp(env: Mapping[str, str]) -> str:
    """Return the options of Isobatch that do the same as Accelerate's FSDP options."""
    version = env.get("FSDP_VERSION", "1")
    options = ["engine=fsdp"]
    if env.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        options.append("engine.offload=true")
    if version == "2" and env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        options.append("engine.config.reshard_after_forward=false")
    first = "" if version == "2" else f"fsdp_version={version} isn't supported, but 2 is, as engine=fsdp: "
    return f"{first}give {' '.join(options)}"

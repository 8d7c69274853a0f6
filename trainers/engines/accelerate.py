"""Reduce gradients by Hugging Face's Accelerate: its Accelerator wraps the model and runs the backward.

What `accelerate launch` has put into the environment is refused where it contradicts the plan, or is another engine's.
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
    """Return the reducer of the engine ``accelerate``: DDP, as an Accelerator wraps it and runs its backward."""
    refuse_contradictions(os.environ, config.precision, config.compile, parts.world.device.type)
    found = accelerator(parts.world, config.engine.config)

    def wrap(root: nn.Module, **ours: Any) -> nn.Module:
        found.ddp_handler = Keywords(found.ddp_handler, ours)
        wrapped: nn.Module = found.prepare_model(root)
        return wrapped

    return DDP(parts, {}, wrap, found.backward)


def preload(config: RunConfig) -> None:
    """Import what the first step imports."""
    import_module("accelerate")


def refuse_environment(config: RunConfig, plan: Plan) -> None:
    """Raise UserError where ``accelerate launch`` asks for another accumulation than the plan has."""
    given = os.environ.get(ACCUMULATION, "1")
    planned = [str(number) for number in sorted({stage.cut.accumulation for stage in plan.stages})]
    if given not in ("1", "auto") and planned != [given]:
        problem = f"{ACCUMULATION}={given}, and the plan has batch.accumulation={', '.join(planned)}"
        raise UserError(problem, "give 1 or auto there, or leave it out", "batch.accumulation")


class Keywords:
    """In the place of the Accelerator's handler of DistributedDataParallel: the user's keywords over ours."""

    def __init__(self, theirs: Any | None, ours: dict[str, Any]) -> None:
        self._keywords = {**ours, **(theirs.to_kwargs() if theirs else {})}
        if "broadcast_buffers" in self._keywords:  # torch takes one of the two
            self._keywords.pop("forward_sync_buffers", None)

    def to_kwargs(self) -> dict[str, Any]:
        return self._keywords

    def register_comm_hook(self, model: nn.Module) -> None:
        """None of them: they compress gradients, which changes the run."""


def accelerator(world: World, config: dict[str, Any]) -> Any:
    """Return an Accelerator for the ranks that are there. Raises UserError where it can't be had so."""
    accelerate = import_engine_package("accelerate")
    theirs = {key: made(f"engine.config.{key}", value) for key, value in config.items() if key in ALLOWED["accelerate"]}
    for handler in theirs.get("kwargs_handlers") or ():  # those of DDP alone mean something, and none changes the sums
        key, name = "engine.config.kwargs_handlers", type(handler).__name__
        if not isinstance(handler, accelerate.DistributedDataParallelKwargs):
            problem = f"{key} has a {name}, and only a DistributedDataParallelKwargs means something"
            fix = "leave it out: precision says what computes and scales, and the process group is Isobatch's"
            raise UserError(problem, fix, key)
        if str(handler.comm_hook) != "no":
            problem = f"{key}: comm_hook={handler.comm_hook} compresses gradients, which changes the run"
            raise UserError(problem, "leave it out", key)
    world.connect()  # it wants a group for a world of one, too
    one_pass = accelerate.utils.GradientAccumulationPlugin(num_steps=1)  # sums are the plan's; else the environment's
    try:
        found = accelerate.Accelerator(
            **theirs, cpu=world.device.type == "cpu", mixed_precision="no", gradient_accumulation_plugin=one_pass,
            dynamo_backend="no",
        )  # fmt: skip
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"accelerate.Accelerator can't be made: {error}", key="engine.config", value=config) from error
    if found.num_processes != world.size or found.device.type != world.device.type:
        sees = f"{found.num_processes} processes on {found.device.type}"
        problem = f"accelerate sees {sees}, and Isobatch {world.size} on {world.device.type}"
        raise UserError(problem, "use engine=ddp, which reads less of the environment", "engine", "accelerate")
    return found


def refuse_contradictions(env: Mapping[str, str], precision: str, compiled: bool, device: str) -> None:
    """Raise UserError where ``accelerate launch``, by its options or its config file, contradicts the plan.

    Args:
        env: the environment, in which it says so.
        device: the type of that which is trained on.
    """

    def on(name: str) -> bool:
        return env.get(f"ACCELERATE_{name}", "").lower() in ("1", "true", "yes", "on")

    def refuse(option: str, fix: str) -> NoReturn:
        raise UserError(f"accelerate launch says {option}", fix)

    if on("USE_DEEPSPEED"):
        stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        refuse("use_deepspeed", f"give engine=deepspeed engine.stage={stage} with it")
    if on("USE_FSDP"):
        refuse("use_fsdp", _fsdp(env))
    if any(map(on, ("USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "IN_TPU_POD"))):
        refuse(
            "use_megatron_lm, use_parallelism_config or tpu, and runs are data-parallel, on CPUs and GPUs",
            "leave it out; engine=fsdp and engine=deepspeed share a model between ranks",
        )
    if on("USE_CPU") and device != "cpu":
        refuse(f"cpu, and device={device}", "give device=cpu, or leave out its cpu")
    wanted = env.get("ACCELERATE_MIXED_PRECISION", "no")  # which it also says where it was told nothing
    if wanted not in ("no", precision):
        instead = f"precision={wanted} with it" if wanted in ("bf16", "fp16") else "precision=bf16 instead"
        refuse(f"mixed_precision={wanted}, and precision={precision}", f"give {instead}")
    backend, mode = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(), env.get("ACCELERATE_DYNAMO_MODE", "default")
    if backend != "no" and (not compiled or backend != "inductor" or mode != "default"):
        refuse(
            f"dynamo_backend={backend} (dynamo_mode={mode}), and here compile={str(compiled).lower()}",
            "compile=true compiles with inductor, in its default mode; give that, and leave the others out",
        )


def _fsdp(said: Mapping[str, str]) -> str:
    """Return what does here what its environment asks for."""
    version = said.get("FSDP_VERSION", "1")
    asked = ["engine=fsdp"]
    if said.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        asked.append("engine.offload=true")
    if version == "2" and said.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        asked.append("engine.config.reshard_after_forward=false")
    first = "" if version == "2" else f"fsdp_version={version} isn't here, and 2 is engine=fsdp: "
    return f"{first}give {' '.join(asked)} with it"

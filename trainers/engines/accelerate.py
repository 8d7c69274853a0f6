"""Hugging Face's Accelerate behind the protocol: its Accelerator wraps the model and runs the backward.

It is on the process group that is there, and what `accelerate launch` and its config file have put into the environment
holds, as far as the plan doesn't say it: what contradicts the plan, or is another engine's, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut
from isobatch.scaling.planning.capabilities import either
from isobatch.trainers.engines.ddp import DDP
from isobatch.trainers.engines.engine import Parts
from isobatch.trainers.model.targets import check_call, made
from isobatch.trainers.ranks.world import World

if TYPE_CHECKING:
    import isobatch.conf.groups

# engine.config may say these only as the plan does (scaling/planning/engine_config.py); the Accelerator is told here.
OURS = ("cpu", "mixed_precision", "gradient_accumulation_steps", "split_batches", "dynamo_backend")
KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")  # where it wraps a model in DDP, or in nothing


class Accelerate(DDP):
    """The engine ``accelerate``.

    Args:
        compiled: whether the model is compiled already.
    """

    def __init__(self, parts: Parts, config: isobatch.conf.groups.Accelerate, compiled: bool) -> None:
        refuse_contradictions(os.environ, parts.precision, compiled, parts.world.device.type)
        self._accelerator = accelerator(parts.world, config.config)
        super().__init__(parts, {})

    def _wrap(self, root: nn.Module, config: dict[str, Any]) -> nn.Module:
        self._accelerator.ddp_handler = Keywords(self._accelerator.ddp_handler, config)
        wrapped: nn.Module = self._accelerator.prepare_model(root)
        return wrapped

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._accelerator.no_sync(self._wrapped)

    def _backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)


class Keywords:
    """In the place of the Accelerator's handler of DistributedDataParallel: the user's keywords over ours."""

    def __init__(self, theirs: Any | None, ours: dict[str, Any]) -> None:
        self._keywords = {**ours, **(theirs.to_kwargs() if theirs else {})}

    def to_kwargs(self) -> dict[str, Any]:
        if "broadcast_buffers" in self._keywords:  # torch takes one of the two
            self._keywords.pop("forward_sync_buffers", None)
        return self._keywords

    def register_comm_hook(self, model: nn.Module) -> None:
        """None of them: they compress gradients, which changes the run."""


def accelerator(world: World, config: dict[str, Any]) -> Any:
    """An Accelerator for the ranks that are there, with ``engine.config`` as its keywords.

    Raises:
        UserError: it isn't installed, or can't be had so.
    """
    try:
        accelerate = import_module("accelerate")
    except ImportError as error:
        raise UserError(
            f"engine=accelerate needs the package accelerate ({error}): pip install '.[accelerate]'"
        ) from error
    check_call("engine.config", "accelerate.Accelerator", accelerate.Accelerator, (), config)
    theirs = {key: made(f"engine.config.{key}", value) for key, value in config.items() if key not in OURS}
    for handler in theirs.get("kwargs_handlers") or ():
        _refuse_handler(handler, accelerate.DistributedDataParallelKwargs)
    world.connect()  # it wants a group for a world of one, too
    one_pass = accelerate.utils.GradientAccumulationPlugin(
        num_steps=1
    )  # sums are the plan's; else the environment's hold
    try:
        found = accelerate.Accelerator(
            **theirs, cpu=world.device.type == "cpu", mixed_precision="no", gradient_accumulation_plugin=one_pass,
            dynamo_backend="no",
        )  # fmt: skip
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"accelerate.Accelerator can't be made: {error}") from error
    kind = found.distributed_type.value
    if kind not in KINDS or found.num_processes != world.size or found.device.type != world.device.type:
        raise UserError(
            f"accelerate sees {found.num_processes} processes ({kind}) on {found.device.type}, and Isobatch "
            f"{world.size} on {world.device.type}: use engine=ddp, which heeds less of the environment"
        )
    return found


def _refuse_handler(handler: Any, able: Any) -> None:
    """Only DDP's keywords mean something here, and none that changes the sums."""
    name = type(handler).__name__
    if not isinstance(handler, able):
        raise UserError(
            f"engine.config.kwargs_handlers has a {name}, and only a DistributedDataParallelKwargs means something "
            "here: what computes and scales is precision, and the process group is Isobatch's"
        )
    if str(handler.comm_hook) != "no":
        raise UserError(
            f"engine.config.kwargs_handlers: comm_hook={handler.comm_hook} compresses gradients, which changes the "
            "run; leave it out"
        )


def refuse_contradictions(said: Mapping[str, str], precision: str, compiled: bool, device: str) -> None:
    """Raises UserError where ``accelerate launch``, by its options or its config file, asks for what the plan hasn't.

    Args:
        said: the environment.
        device: the type of that which is trained on.
    """

    def on(name: str) -> bool:
        return said.get(name, "").lower() in ("1", "true", "yes", "on")

    if on("ACCELERATE_USE_DEEPSPEED"):
        stage = said.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        raise UserError(f"accelerate launch says use_deepspeed: give engine=deepspeed engine.stage={stage} with it")
    if on("ACCELERATE_USE_FSDP"):
        raise UserError(f"accelerate launch says use_fsdp: {_fsdp(said)}")
    if on("ACCELERATE_USE_MEGATRON_LM") or on("ACCELERATE_USE_PARALLELISM_CONFIG") or on("ACCELERATE_IN_TPU_POD"):
        raise UserError(
            "accelerate launch says use_megatron_lm, use_parallelism_config or tpu, and runs are data-parallel, on "
            "CPUs and GPUs: leave it out; engine=fsdp and engine=deepspeed share a model between ranks"
        )
    if on("ACCELERATE_USE_CPU") and device != "cpu":
        raise UserError(f"accelerate launch says cpu, and device={device}: give device=cpu, or leave out its cpu")
    wanted = said.get("ACCELERATE_MIXED_PRECISION", "no")  # which it also says where it was told nothing
    if wanted not in ("no", precision):
        instead = f"give precision={wanted} with it" if wanted in ("bf16", "fp16") else "give precision=bf16 instead"
        raise UserError(f"accelerate launch says mixed_precision={wanted}, and precision={precision}: {instead}")
    backend, mode = said.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(), said.get("ACCELERATE_DYNAMO_MODE", "default")
    if backend != "no" and (not compiled or backend != "inductor" or mode != "default"):
        raise UserError(
            f"accelerate launch says dynamo_backend={backend} (dynamo_mode={mode}), and here compile="
            f"{str(compiled).lower()}: compile=true compiles with inductor, in its default mode; give that, and leave "
            "the others out"
        )


def refuse_accumulation(said: Mapping[str, str], planned: set[int]) -> None:
    """Raises UserError where ``accelerate launch`` asks for another accumulation than the plan has.

    Args:
        said: the environment.
        planned: the accumulations of the plan's stages.
    """
    given = said.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if given in ("1", "auto") or {given} == {str(one) for one in planned}:
        return
    numbers = sorted(planned)
    may = ["1", "auto"] if len(numbers) > 1 or numbers == [1] else [str(numbers[0]), "1", "auto"]
    raise UserError(
        f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={given}, and the plan has batch.accumulation="
        f"{', '.join(map(str, numbers))}: give {either(may)} there, or leave it out"
    )


def _fsdp(said: Mapping[str, str]) -> str:
    """What does here what its environment asks for."""
    version = said.get("FSDP_VERSION", "1")
    asked = ["engine=fsdp"]
    if said.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        asked.append("engine.offload=true")
    if version == "2" and said.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        asked.append("engine.config.reshard_after_forward=false")
    first = "" if version == "2" else f"fsdp_version={version} isn't here, and 2 is engine=fsdp: "
    return f"{first}give {' '.join(asked)} with it"

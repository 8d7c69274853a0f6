"""What the loop asks of an engine, and how one is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from isobatch.trainers.engines.step_report import Note, Number, Total

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.scaling.geometry import Cut
    from isobatch.scaling.plan import Plan
    from isobatch.scaling.rules import Recipe
    from isobatch.trainers.model.average import Average
    from isobatch.trainers.optim.groups import Groups
    from isobatch.trainers.optim.make import Tuned
    from isobatch.trainers.ranks.world import World
    from isobatch.trainers.tasks.task import Task
    from isobatch.trainers.tensors.slices import Reader, Slice

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step found.

    Attributes:
        grad_norm: of the whole normalised gradient, before clipping.
        skipped: it wasn't finite, and nothing was changed.
        parts_sq: Σ_j |p_j|²/b_j over the micro-batches (see scaling/noise.py); None where it wasn't measured.
    """

    grad_norm: Number
    skipped: bool = False
    parts_sq: Number | None = None


class Engine(Protocol):
    """Forward, backward, reduction and update of one model over all ranks.

    A step is: ``accumulation`` times ``micro``, ``loss`` and ``backward``, then ``total``, then ``update``.
    """

    model: nn.Module
    """The bare model."""

    average: Average | None
    """The moving average of its weights."""

    lockstep: bool
    """A forward sends messages, so all ranks run as many: one that has no samples runs a stand-in, of other samples."""

    def micro(self, cut: Cut, last: bool) -> AbstractContextManager[Any]:
        """Around one pass, perhaps the ``last``, of a step that is cut so."""

    def loss(self, batch: Any | None, samples: int) -> tuple[Tensor, float | Tensor]:
        """The task's sum of losses and number of units.

        Args:
            samples: of the batch; 0: a stand-in, which adds nothing to any sum and touches no statistics. Its batch is
                None, but where ranks go in lockstep.

        Raises:
            UserError: the task's loss isn't (sum, units).
        """

    def backward(self, loss: Tensor, note: Note, measured: int | None = None) -> None:
        """Backward; ``note`` travels with the gradients.

        Args:
            measured: samples of this micro-batch (0: a stand-in), where its gradient's norm is to be measured: in all
                passes of a step on all ranks, or in none.
        """

    def total(self, expected_units: int) -> Total:
        """The notes of all ranks and passes of a step that is expected to have ``expected_units``, summed."""

    def update(self, scale: Number, clip_norm: float | None, recipe: Recipe) -> Update:
        """Scale the summed gradient, clip it to ``clip_norm``, step the optimizer, drop the gradient.

        Where ``on_nonfinite`` is skip, a gradient or scale that isn't finite is dropped, on all ranks, and with it what
        the step did to the model's buffers. So it is in fp16, and the loss scale is halved.

        Raises:
            RunFailed: in fp16, it wasn't finite at the lowest loss scale.
            UserError: after the first step: the optimizer keeps what a checkpoint can't hold.
        """

    def call(self, work: Callable[[], Found]) -> Found:
        """What ``work`` returns, which calls the model outside of a step; in lockstep, on all ranks."""

    def parting(self) -> str | None:
        """Say what this rank, which makes no progress, ran otherwise than rank 0; None: nothing shows that it did."""

    def eval_weights(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that the optimizer evaluates; called by all ranks, between two steps."""

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what every checkpoint has: ``model/<name>`` and ``ema/<name>``.

        Raises:
            UserError: the model keeps what a checkpoint can't hold.
        """

    def slices(self) -> Iterator[Slice]:
        """This rank's part of what a checkpoint holds; the parts of all ranks are everything, once.

        Called by all ranks after the same step: ranks may talk to each other.
        """

    def values(self) -> dict[str, Any]:
        """What isn't a tensor, as JSON; the same on all ranks."""

    def restore(self, reader: Reader) -> None:
        """Go on from a checkpoint, of any engine and number of ranks."""

    def whole(self, name: str) -> Tensor:
        """A tensor of ``layout`` on all ranks, which call this alike."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of.

    Attributes:
        model: on the CPU, the same on all ranks; the engine brings it to its device.
        make_optimizer: called once the model has the parameters that are trained.
        ema: keep a moving average of the weights.
        skip_nonfinite: a step whose gradient isn't finite changes nothing.
        precision: fp32, bf16 or fp16.
    """

    task: Task
    model: nn.Module
    make_optimizer: Callable[[], Tuned]
    world: World
    ema: bool = False
    skip_nonfinite: bool = False
    precision: str = "fp32"


def make_engine(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    recipe: Recipe,
    world: World,
    stored: Groups = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Engine:
    """The engine that the config names.

    Args:
        recipe: what the optimizer is made with; so are ``stored`` and ``tell``.

    Raises:
        UserError: it can't train this model, or the package that it needs isn't installed.
    """
    from isobatch.trainers.model.precision import check_precision
    from isobatch.trainers.optim.make import make_optimizer

    check_precision(config.precision, world.device)
    parts = Parts(
        task,
        model,
        lambda: make_optimizer(config, task, model, recipe, stored, tell),
        world,
        ema=config.ema is not None,
        skip_nonfinite=config.on_nonfinite == "skip",
        precision=config.precision,
    )
    engine: Any = config.engine
    if config.numerics == "bitwise":
        from isobatch.trainers.engines.bitwise.bitwise import Bitwise

        return Bitwise(parts)
    if engine.name == "fsdp":
        from isobatch.trainers.engines.fsdp import FSDP

        return FSDP(parts, engine)
    if engine.name == "deepspeed":
        from isobatch.trainers.engines.deepspeed.deepspeed import Replicated, ZeRO

        return (ZeRO if engine.stage else Replicated)(parts, engine)
    if engine.name == "accelerate":
        from isobatch.trainers.engines.accelerate import Accelerate

        return Accelerate(parts, engine, config.compile)
    from isobatch.trainers.engines.ddp import DDP

    return DDP(parts, engine.config)


def refuse_environment(config: RunConfig, plan: Plan) -> None:
    """Raises UserError where what the engine is launched with contradicts the plan."""
    if config.engine.name == "accelerate":
        from isobatch.trainers.engines.accelerate import refuse_accumulation

        refuse_accumulation(os.environ, {stage.cut.accumulation for stage in plan.stages})


def import_engine(config: RunConfig) -> None:
    """Import what ``make_engine`` and the first step import, once for all workers that are forked from here.

    It starts no thread, and no CUDA. A package that can't be imported is the workers' to refuse.
    """
    engine: Any = config.engine
    import_module(f"isobatch.trainers.engines.{engine.name}")
    with suppress(Exception):
        if engine.name == "accelerate":
            import_module("accelerate")
        if engine.name == "deepspeed":
            from isobatch.trainers.engines.deepspeed.setup import import_deepspeed

            import_deepspeed()
            if engine.stage:
                import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # it asks whether the optimizer is one

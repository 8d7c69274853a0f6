"""What the loop asks of an engine, and how one is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from trainers.tally import Note, Number, Total

if TYPE_CHECKING:
    from conf.schema import RunConfig
    from scaling.rules import Recipe
    from trainers.average import Average
    from trainers.checkpoints.slices import Reader, Slice
    from trainers.optim import Tuned
    from trainers.tasks import Task
    from trainers.world import World


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

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Around one pass; gradients are reduced in the ``last`` one of a step only."""

    def loss(self, batch: Any | None) -> tuple[Tensor, float | Tensor]:
        """The task's sum of losses and number of units; a zero of both for None, a rank's empty micro-batch.

        Raises:
            Refused: the task's loss isn't (sum, units).
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
            Fatal: in fp16, it wasn't finite at the lowest loss scale.
            Refused: after the first step: the optimizer keeps what a checkpoint can't hold.
        """

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what every checkpoint has: ``model/<name>`` and ``ema/<name>``.

        Raises:
            Refused: the model keeps what a checkpoint can't hold.
        """

    def slices(self) -> Iterator[Slice]:
        """This rank's part of what a checkpoint holds; the parts of all ranks are everything, once.

        Called by all ranks after the same step: ranks may talk to each other.

        """

    def values(self) -> dict[str, Any]:
        """What isn't a tensor, as JSON; the same on all ranks."""

    def restore(self, reader: Reader) -> None:
        """Go on from a checkpoint, of any engine and number of ranks."""


def make_engine(config: RunConfig, task: Task, model: nn.Module, tuned: Tuned, world: World) -> Engine:
    """The engine that the config names. ``model`` is on the world's device already."""
    from trainers.average import Average
    from trainers.engines.ddp import DDP
    from trainers.precision import check_precision

    check_precision(config.precision, world.device)
    average = None if config.ema is None else Average(dict(model.named_parameters()))
    skip = config.on_nonfinite == "skip"
    return DDP(
        task, model, tuned, average, world, config.engine.config, skip_nonfinite=skip, precision=config.precision
    )

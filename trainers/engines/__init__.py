"""What the loop asks of an engine, and how one is made."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from trainers.tally import Note, Number, Total

if TYPE_CHECKING:
    from conf.schema import RunConfig
    from scaling.rules import Recipe
    from trainers.optim import Tuned
    from trainers.tasks import Task
    from trainers.world import World


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step found: the norm of the whole normalised gradient before clipping."""

    grad_norm: Number


class Engine(Protocol):
    """Forward, backward, reduction and update of one model over all ranks.

    A step is: ``accumulation`` times ``micro``, ``loss`` and ``backward``, then ``total``, then ``update``.
    """

    model: nn.Module
    """The bare model."""

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Around one pass; gradients are reduced in the ``last`` one of a step only."""

    def loss(self, batch: Any | None) -> tuple[Tensor, float | Tensor]:
        """The task's sum of losses and number of units; a zero of both for None, a rank's empty micro-batch.

        Raises:
            Refused: the task's loss isn't (sum, units).
        """

    def backward(self, loss: Tensor, note: Note) -> None:
        """Backward; ``note`` travels with the gradients."""

    def total(self, expected_units: int) -> Total:
        """The notes of all ranks and passes of a step that is expected to have ``expected_units``, summed."""

    def update(self, scale: Number, clip_norm: float | None, recipe: Recipe) -> Update:
        """Scale the summed gradient, clip it to ``clip_norm``, step the optimizer, drop the gradient."""


def make_engine(config: RunConfig, task: Task, model: nn.Module, tuned: Tuned, world: World) -> Engine:
    """The engine that the config names. ``model`` is on the world's device already."""
    from trainers.engines.ddp import DDP

    return DDP(task, model, tuned, world, config.engine.config)

"""Check that all ranks run the same modules in the same order, for engines whose forward communicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from isobatch.trainers.ranks.trails import Trail
from isobatch.trainers.ranks.world import World


class Lockstep:
    """Compare the modules that ranks run in each step and in each pass of an evaluation.

    Args:
        instead: the engine or settings that the error suggests if ranks run different modules.

    Attributes:
        trail: the record of the modules that this rank runs.
    """

    def __init__(self, world: World, instead: str) -> None:
        zero = "give every module a part in each loss (loss + 0 * output.sum())"
        self.trail = Trail(world.store, world.rank, world.size, f"use {instead}, or {zero}")
        self._world = world
        self._sent: dist.Work | None = None
        self._numbers = torch.zeros(2, dtype=torch.float64)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Record one forward outside of a step. Raise UserError if ranks run different modules."""
        with self.trail.begin("evaluation"):
            yield
            numbers = torch.tensor(self.trail.numbers(), dtype=torch.float64)
            self.trail.check(*self._world.sum(numbers).tolist())

    def ride(self) -> list[Tensor]:
        """Return the tensors that the step's message has to sum over ranks, in place.

        On an accelerator there are none: the CPUs send a separate message, and nothing waits for the device.
        """
        self._numbers = torch.tensor(self.trail.numbers(), dtype=torch.float64)
        if self._world.device.type == "cpu":
            return [self._numbers]
        self._sent = dist.all_reduce(self._numbers, async_op=True)
        return []

    def check(self) -> None:
        """Raise UserError if ranks have run different modules in this step; call it before weights change."""
        if self._sent:
            self._sent.wait()
            self._sent = None
        self.trail.check(*self._numbers.tolist())

"""Engines whose forward sends messages: all ranks have to run the same modules in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from isobatch.trainers.ranks.trails import Trail
from isobatch.trainers.ranks.world import World


class Lockstep:
    """Compare what ranks run, in each step and each pass of an evaluation.

    Args:
        instead: what to use where ranks run different modules.

    Attributes:
        trail: what this rank runs.
    """

    def __init__(self, world: World, instead: str) -> None:
        zero = "give every module a part in each loss (loss + 0 * output.sum())"
        self.trail = Trail(world.store, world.rank, world.size, f"use {instead}, or {zero}")
        self._world = world
        self._sent: dist.Work | None = None
        self._numbers = torch.zeros(2, dtype=torch.float64)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around one forward outside of a step. Raises UserError where ranks run different modules."""
        with self.trail.begin("evaluation"):
            yield
            numbers = torch.tensor(self.trail.numbers(), dtype=torch.float64)
            self.trail.check(*self._world.sum(numbers).tolist())

    def ride(self) -> list[Tensor]:
        """Return what is to be summed over ranks with the step's message, in place.

        On an accelerator that is nothing: the CPUs send a message of their own, so that no look waits for the device.
        """
        self._numbers = torch.tensor(self.trail.numbers(), dtype=torch.float64)
        if self._world.device.type == "cpu":
            return [self._numbers]
        self._sent = dist.all_reduce(self._numbers, async_op=True)
        return []

    def check(self) -> None:
        """Raise UserError where ranks have run different modules in this step; call it before any weight moves."""
        if self._sent:
            self._sent.wait()
            self._sent = None
        self.trail.check(*self._numbers.tolist())

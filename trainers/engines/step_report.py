"""The note that rides along with the gradients: what all ranks have to know of a step, summed over ranks and passes.

It is the gradient of a small extra parameter, so it travels in the engine's own reduction and costs no message. In fp32
a mean over ranks isn't exact. So units go twice: as their deviation from the plan, which is exactly 0 where the plan is
met, and as they are, which is right to rounding where they are few, and exactly 0 where there are none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Number = float | Tensor
"""A float on the CPU; elsewhere, where a look would wait for the device, a 0-dim float64 tensor on it."""

FIELDS = ("loss", "units", "deviation", "stop", "save")


@dataclass(frozen=True, slots=True)
class Note:
    """What one pass of one rank has to say.

    Attributes:
        loss, units: sum of the losses over its units, and their number.
        expected_units: as many as the plan expects of it.
        stop: this rank was asked to stop.
        save: this rank says that it's time for a checkpoint.
    """

    loss: Tensor
    units: float | Tensor
    expected_units: int
    stop: bool = False
    save: bool = False


class NoteCarrier(nn.Module):
    """Holds the extra parameter; it belongs to no optimizer, norm or checkpoint."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.note = nn.Parameter(torch.zeros(len(FIELDS), device=device))
        self._outgoing = torch.zeros(len(FIELDS), device=device)

    def attach(self, loss: Tensor) -> Tensor:
        """``loss`` unchanged; its backward leaves what was written last as the parameter's gradient."""
        attached: Tensor = Attach.apply(loss, self.note, self._outgoing)  # type: ignore[no-untyped-call]
        return attached

    def add(self) -> None:
        """Leave what was written last as the parameter's gradient, where that doesn't ride on a backward."""
        accumulate(self.note, self._outgoing)

    def write(self, note: Note) -> Tensor:
        """Set the note of the coming backward, and give it as it will travel."""
        loss, rest = note.loss.detach(), (note.units, note.units - note.expected_units, note.stop, note.save)
        if self._outgoing.is_cpu:
            self._outgoing.copy_(torch.tensor((loss.item(), *rest)))
            return self._outgoing
        # without a wait for the device, and in as few operations as can be
        known = [0.0 if isinstance(number, Tensor) else float(number) for number in rest]
        self._outgoing[1:].copy_(torch.tensor(known), non_blocking=True)
        for index, number in enumerate((loss, *rest)):
            if isinstance(number, Tensor):
                self._outgoing[index] = number
        return self._outgoing

    def take(self, ranks: int, expected_units: int) -> Total:
        """The notes of a step; leaves none behind.

        Args:
            ranks: by which the reduction divided.
            expected_units: of the whole step.
        """
        assert self.note.grad is not None, "no backward since the last take"
        numbers = self.note.grad.double() * ranks
        self.note.grad = None
        loss, units, deviation, stop, save = numbers.tolist() if numbers.is_cpu else numbers
        planned, few = deviation + expected_units, units < expected_units / 2
        if isinstance(few, Tensor):
            return Total(loss, torch.where(few, units, planned), stop, save)
        return Total(loss, units if few else planned, stop, save)


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """What a backward does with a gradient."""
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


class Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, note: Tensor, outgoing: Tensor) -> Tensor:
        ctx.outgoing = outgoing
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.outgoing.clone(), None


@dataclass(frozen=True, slots=True)
class Total:
    """The notes of all ranks and passes of one step, summed.

    Attributes:
        loss: sum of the losses over all units of the global batch.
        units: their number.
        stop, save: above 0 where some rank was asked to stop, or says that it's time for a checkpoint.
    """

    loss: Number
    units: Number
    stop: Number
    save: Number

    def scale(self, expected_units: int) -> Number:
        """What the sum of gradients, divided by ``expected_units`` already, is short of the mean over the units.

        Not finite where the loss isn't: then no gradient of this step can be used.
        """
        if isinstance(self.units, Tensor):
            return expected_units / self.units + 0 * self.loss
        return expected_units / self.units + 0 * self.loss if self.units else math.inf

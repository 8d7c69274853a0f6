"""Let what ranks tell each other of a step travel with the gradient: notes, and what BatchNorm layers found.

A note is the gradient of a small extra parameter, so it travels in the engine's own reduction and costs no message. In
fp32 a mean over ranks isn't exact. So units go twice: as their deviation from the plan, which is exactly 0 where the
plan is met, and as they are, which is right to rounding where they are few, and exactly 0 where there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isobatch.trainers.engines.step_report import Note, Total
from isobatch.trainers.model.batchnorm import statistics_of
from isobatch.trainers.ranks.world import World

FIELDS = ("loss", "units", "deviation", "stop", "save")


class Riders:
    """Gradients of extra parameters, which are summed over passes and ranks as those of the model.

    Either they ride in the reduction of the model's gradients, or in the message that sums the gradient's norm.

    Attributes:
        parameters: whose gradients they are; the note's is the first. They belong to no optimizer, norm or checkpoint.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world, self._rides, self._mean_over = world, False, 1
        self._note = nn.Parameter(torch.zeros(len(FIELDS), device=world.device))
        self._outgoing = torch.zeros_like(self._note, requires_grad=False)
        self._statistics = statistics_of(model, world.device)
        self.parameters = [self._note, *([self._statistics.sums] if self._statistics else [])]

    def ride_in(self, root: nn.Module, mean_over: int) -> None:
        """Ride with the gradients of the parameters of ``root``, whose sums are divided by ``mean_over``."""
        self._rides, self._mean_over = True, mean_over
        root.add_module("riders", nn.ParameterList(self.parameters))

    def begin(self) -> None:
        """Before a forward."""
        if self._statistics:
            self._statistics.begin()

    def attach(self, loss: Tensor) -> Tensor:
        """Return ``loss``, with whose backward what this pass has to say is told."""
        if self._statistics and self._rides:
            loss = attach(loss, self._statistics.sums, self._statistics.of_this_pass())
        elif self._statistics:
            accumulate(self._statistics.sums, self._statistics.of_this_pass())
        return attach(loss, self._note, self._outgoing) if self._rides else loss

    def write(self, note: Note) -> None:
        """Set the note of the coming backward."""
        loss, rest = note.loss.detach(), (note.units, note.units - note.expected_units, note.stop, note.save)
        if self._outgoing.is_cpu:
            self._outgoing.copy_(torch.tensor((loss.item(), *rest)))
        else:  # without a wait for the device, and in as few operations as can be
            known = [0.0 if isinstance(number, Tensor) else float(number) for number in rest]
            self._outgoing[1:].copy_(torch.tensor(known), non_blocking=True)
            for index, number in enumerate((loss, *rest)):
                if isinstance(number, Tensor):
                    self._outgoing[index] = number
        if not self._rides:
            accumulate(self._note, self._outgoing)

    def total(self, square: Tensor, *more: Tensor) -> Tensor:
        """Return ``square`` (0-dim) summed over all ranks, by one message; riders and ``more`` are summed in place."""
        riding = [*(rider.grad for rider in self.parameters if rider.grad is not None), *more]
        message = torch.cat([square.reshape(1).double(), *(one.reshape(-1).double() for one in riding)])
        self._world.sum(message)
        for one, whole in zip(riding, message[1:].split([one.numel() for one in riding]), strict=True):
            one.copy_(whole.view(one.shape))
        return message[0]

    def take(self, expected_units: int) -> Total:
        """Return the notes of a step that is expected to have ``expected_units``, summed; leave none behind."""
        assert self._note.grad is not None, "no backward since the last take"
        numbers = self._note.grad.double() * self._mean_over
        self._note.grad = None
        loss, units, deviation, stop, save = numbers.tolist() if numbers.is_cpu else numbers
        planned, few = deviation + expected_units, units < expected_units / 2
        if isinstance(few, Tensor):
            return Total(loss, torch.where(few, units, planned), stop, save)
        return Total(loss, units if few else planned, stop, save)

    def settle(self, keep: bool) -> None:
        """End the step: move the running statistics of BatchNorm layers; without ``keep`` forget what they found."""
        if self._statistics and keep:
            self._statistics.update()
        elif self._statistics:
            self._statistics.sums.grad = None


def attach(loss: Tensor, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Return `loss` unchanged; its backward adds to the gradient of `parameter` what `gradient` holds by then."""
    attached: Tensor = _Attach.apply(loss, parameter, gradient)  # type: ignore[no-untyped-call]
    return attached


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add `gradient` to that of `parameter`, as a backward does."""
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.gradient.clone(), None

"""Send notes and BatchNorm statistics to the other ranks along with the gradient.

A note is the gradient of a small extra parameter, so the engine's own reduction sums it and it costs no message. In
fp32 a mean over ranks isn't exact, so units are sent twice. Their deviation from the plan is exactly 0 if the plan is
met. Their number is accurate to rounding if it is small, and exactly 0 if there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.trainers.engines.step_report import Measures, Note, Requests, Total
from isobatch.trainers.model.batchnorm import statistics_of
from isobatch.trainers.ranks.world import World, real_view

FIELDS = ("loss", "units", "deviation", "waited_s", *Requests._fields)
MOST_MEASURES = 16  # of a task; each takes two numbers of every note


class Riders:
    """Gradients of extra parameters, summed over passes and ranks like the model's gradients.

    They travel in the reduction of the model's gradients, or in the message that sums the gradient's norm.

    Attributes:
        parameters: the extra parameters, the note's first. They are in no optimizer, norm or checkpoint.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world, self._rides, self._mean_over = world, False, 1
        self._note = nn.Parameter(torch.zeros(len(FIELDS) + 2 * MOST_MEASURES, device=world.device))
        self._outgoing = torch.zeros_like(self._note, requires_grad=False)
        self._host: Any = self._outgoing.numpy() if self._outgoing.is_cpu else None  # its memory, quick to write to
        self._measures: list[str] | None = None  # names of the task's measures, once known
        self._statistics = statistics_of(model, world.device)
        self.parameters = [self._note, *([self._statistics.sums] if self._statistics else [])]
        self._aside: list[Tensor] = []

    def ride_in(self, root: nn.Module, mean_over: int) -> None:
        """Add the riders to the parameters of ``root``, whose summed gradients are divided by ``mean_over``."""
        self._rides, self._mean_over = True, mean_over
        root.add_module("riders", nn.ParameterList(self.parameters))

    def begin(self) -> None:
        """Reset the statistics of the pass; called before each forward."""
        if self._statistics:
            self._statistics.begin()

    def attach(self, loss: Tensor) -> Tensor:
        """Attach the note and the statistics of this pass to the backward of ``loss``."""
        if self._statistics and self._rides:
            loss = attach(loss, self._statistics.sums, self._statistics.of_this_pass())
        elif self._statistics:
            accumulate(self._statistics.sums, self._statistics.of_this_pass())
        return attach(loss, self._note, self._outgoing) if self._rides else loss

    def write(self, note: Note) -> None:
        """Set the note that the next backward sends."""
        loss, deviation = note.loss.detach(), note.units - note.expected_units
        rest = [note.units, deviation, note.waited_s, *note.requests, *self._numbers(note.measures, note.units)]
        if self._outgoing.is_cpu:
            self._host[: len(rest) + 1] = [float(number) for number in (loss, *rest)]
            self._host[len(rest) + 1 :] = 0.0
        else:  # without waiting for the device, and in few operations
            known = [0.0 if isinstance(number, Tensor) else float(number) for number in rest]
            known += [0.0] * (len(self._outgoing) - 1 - len(known))
            self._outgoing[1:].copy_(torch.tensor(known), non_blocking=True)
            for index, number in enumerate((loss, *rest)):
                if isinstance(number, Tensor):
                    self._outgoing[index] = number
        if not self._rides:
            accumulate(self._note, self._outgoing)

    def _numbers(self, measures: Measures, units: float | Tensor) -> list[float | Tensor]:
        """Return sums and counts in the order of their names, which have to be the same in each pass with units."""
        names = sorted(measures)
        if not names and not isinstance(units, Tensor) and not units:
            return []
        if self._measures is None:
            self._measures = names
            if len(names) > MOST_MEASURES:
                problem = f"task.loss returned {len(names)} measures, and the most are {MOST_MEASURES}"
                raise UserError(problem, "return fewer; evaluate() may return any number", "task._target_")
        if names != self._measures:
            problem = f"task.loss returned the measures {names}, and for an earlier batch {self._measures}"
            raise UserError(problem, "return the same names for every batch, with the count 0 where there is nothing")
        return [number for name in names for number in measures[name]]

    def total(self, square: Tensor, *more: Tensor) -> Tensor:
        """Sum ``square`` (0-dim), the riders and ``more`` over all ranks in one message, the last two in place."""
        riding = [*(rider.grad for rider in self.parameters if rider.grad is not None), *map(real_view, more)]
        message = torch.cat([square.reshape(1).double(), *(one.reshape(-1).double() for one in riding)])
        self._world.sum(message)
        for one, whole in zip(riding, message[1:].split([one.numel() for one in riding]), strict=True):
            one.copy_(whole.view(one.shape))
        return message[0]

    def take(self, expected_units: int) -> Total:
        """Return and reset the sum of the notes of a step of ``expected_units``."""
        assert self._note.grad is not None, "no backward since the last take"
        used = len(FIELDS) + 2 * len(self._measures or ())
        grad, self._note.grad = self._note.grad, None
        if grad.is_cpu:  # numpy is quicker than torch for a few numbers
            summed: Any = (grad.numpy()[:used].astype("float64") * self._mean_over).tolist()
        else:
            summed = grad[:used].double() * self._mean_over
        loss, units, deviation, waited_s, *rest = summed
        requests, pairs = Requests(*rest[: len(Requests._fields)]), iter(rest[len(Requests._fields) :])
        measures = {name: (next(pairs), next(pairs)) for name in self._measures or ()}
        planned, few = deviation + expected_units, units < expected_units / 2
        if isinstance(few, Tensor):
            return Total(loss, torch.where(few, units, planned), measures, waited_s, requests)
        return Total(loss, units if few else planned, measures, waited_s, requests)

    def set_aside(self) -> None:
        """Keep the reduced gradients of the riders apart from those of the next passes."""
        self._aside = [rider.grad.clone() for rider in self.parameters if rider.grad is not None]
        for rider in self.parameters:
            rider.grad = None

    def join(self) -> None:
        """Add the gradients that were set aside."""
        for rider, before in zip(self.parameters, self._aside, strict=True):
            accumulate(rider, before)
        self._aside = []

    def abandon(self) -> None:
        """Drop the notes and the statistics of a step that won't end."""
        for parameter in self.parameters:
            parameter.grad = None

    def settle(self, keep: bool) -> None:
        """Update the running statistics of BatchNorm layers, or drop the step's statistics if ``keep`` is false."""
        if self._statistics and keep:
            self._statistics.update()
        elif self._statistics:
            self._statistics.sums.grad = None


def attach(loss: Tensor, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Return `loss` unchanged; its backward adds the value that `gradient` then has to the gradient of `parameter`."""
    attached: Tensor = _Attach.apply(loss, parameter, gradient)  # type: ignore[no-untyped-call]
    return attached


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add `gradient` to the gradient of `parameter`, as a backward does."""
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.gradient.clone(), None

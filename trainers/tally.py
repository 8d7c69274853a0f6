"""The note that rides along with the gradients: what all ranks have to know of a step, summed over ranks and passes.

It is the gradient of a small extra parameter, so it travels in the engine's own reduction and costs no message. In fp32
a mean over ranks isn't exact. So units go twice: as their deviation from the plan, which is exactly 0 where the plan is
met, and as they are, which is right to rounding where they are few, and exactly 0 where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaling.plan import Step

FIELDS = ("loss", "units", "deviation", "stop")


@dataclass(frozen=True, slots=True)
class Note:
    """What one pass of one rank has to say.

    Attributes:
        loss, units: sum of the losses over its units, and their number.
        expected_units: as many as the plan expects of it.
        stop: this rank was asked to stop.
    """

    loss: Tensor
    units: float | Tensor
    expected_units: int
    stop: bool


class NoteCarrier(nn.Module):
    """Holds the extra parameter; it belongs to no optimizer, norm or checkpoint."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.note = nn.Parameter(torch.zeros(len(FIELDS), device=device))
        self._outgoing = torch.zeros(len(FIELDS), device=device)

    def attach(self, loss: Tensor) -> Tensor:
        """``loss`` unchanged; its backward leaves what was written last as the parameter's gradient."""
        attached: Tensor = _Attach.apply(loss, self.note, self._outgoing)  # type: ignore[no-untyped-call]
        return attached

    def write(self, note: Note) -> None:
        """Set the note of the coming backward."""
        numbers = (note.loss.detach(), note.units, note.units - note.expected_units, float(note.stop))
        for index, number in enumerate(numbers):
            self._outgoing[index] = number

    def take(self, ranks: int, expected_units: int) -> Total:
        """The notes of a step; leaves none behind.

        Args:
            ranks: by which the reduction divided.
            expected_units: of the whole step.
        """
        assert self.note.grad is not None, "no backward since the last take"
        loss, units, deviation, stop = (self.note.grad * ranks).double()
        self.note.grad = None
        return Total(loss, torch.where(units < expected_units / 2, units, deviation + expected_units), stop)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, note: Tensor, outgoing: Tensor) -> Tensor:
        ctx.outgoing = outgoing
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.outgoing.clone(), None


@dataclass(frozen=True, slots=True)
class Total:
    """The notes of all ranks and passes of one step, summed: 0-dim float64 on the training device.

    Attributes:
        loss: sum of the losses over all units of the global batch.
        units: their number.
        stop: above 0 where some rank was asked to stop.
    """

    loss: Tensor
    units: Tensor
    stop: Tensor


@dataclass(frozen=True, slots=True)
class News:
    """What the host knows of a completed step. ``loss`` is the mean over the units of the global batch."""

    step: Step
    loss: float
    units: float
    grad_norm: float
    stop: bool


class Pulse:
    """Brings each step's numbers to the host: at once on the CPU, elsewhere a step late, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: tuple[Step, Tensor, torch.Event] | None = None

    def read(self, step: Step, total: Total, grad_norm: Tensor) -> News | None:
        """The news of ``step``, or, on an accelerator, of the step before it (None at the first)."""
        numbers = torch.stack((total.loss, total.units, total.stop, grad_norm.double()))
        if self._device.type == "cpu":
            return _news(step, numbers)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._device.type == "cuda")
        host.copy_(numbers, non_blocking=True)
        copied = torch.Event(self._device)
        copied.record()
        before, self._under_way = self._under_way, (step, host, copied)
        return _arrived(before)

    def last(self) -> News | None:
        """What is still under way after the last step."""
        before, self._under_way = self._under_way, None
        return _arrived(before)


def _arrived(message: tuple[Step, Tensor, torch.Event] | None) -> News | None:
    if message is None:
        return None
    step, host, copied = message
    copied.synchronize()
    return _news(step, host)


def _news(step: Step, numbers: Tensor) -> News:
    loss, units, stop, grad_norm = numbers.tolist()
    return News(step, loss / units if units else loss, units, grad_norm, stop > 0)

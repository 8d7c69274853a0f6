"""Copy each step's numbers from the device to the host without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isobatch.scaling.plan import Step
from isobatch.trainers.engines.step_report import Total, Update


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of a completed step, on the host.

    Attributes:
        loss: mean loss over the units of the global batch.
        stop, save: any rank was asked to stop, or asks for a checkpoint.
        parts_sq: see ``Update``; None if it wasn't measured.
    """

    step: Step
    loss: float
    units: float
    grad_norm: float
    stop: bool
    save: bool
    parts_sq: float | None = None


class DelayedReadback:
    """Read each step's numbers: on the CPU at once, on an accelerator one step late, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[Step, Tensor, torch.Event] | None = None

    def read(self, step: Step, total: Total, update: Update) -> StepResult | None:
        """Return the result of ``step``; on an accelerator that of the previous step, None at the first."""
        found = [total.loss, total.units, total.stop, total.save, update.grad_norm]
        if update.parts_sq is not None:
            found.append(update.parts_sq)
        if self._device.type == "cpu":
            return _result(step, *map(float, found))
        numbers = torch.stack([torch.as_tensor(number) for number in found])
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._device.type == "cuda")
        host.copy_(numbers, non_blocking=True)
        copied = torch.Event(self._device)
        copied.record()
        previous, self._pending = self._pending, (step, host, copied)
        return _arrived(previous)

    def flush(self) -> StepResult | None:
        """Wait for the pending result and return it; None if there is none."""
        previous, self._pending = self._pending, None
        return _arrived(previous)


def _arrived(message: tuple[Step, Tensor, torch.Event] | None) -> StepResult | None:
    if message is None:
        return None
    step, host, copied = message
    copied.synchronize()
    return _result(step, *host.tolist())


def _result(
    step: Step, loss: float, units: float, stop: float, save: float, grad_norm: float, parts_sq: float | None = None
) -> StepResult:
    return StepResult(step, loss / units if units else loss, units, grad_norm, stop > 0, save > 0, parts_sq)

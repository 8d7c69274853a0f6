"""Copy each step's numbers from the device to the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isobatch.scaling.noise import RAW, Estimate, Norm
from isobatch.scaling.plan import Step
from isobatch.trainers.engines.step_report import Number, Requests, Total, Update


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of a completed step, on the host.

    Attributes:
        loss: mean loss over the units of the global batch.
        waited_s: seconds that the ranks waited for data, summed over them.
        requests: any rank asks for it.
        measures: the task's own sums and counts, by name.
        estimate: of the gradient noise; None if it wasn't measured.
        norm: see ``Update``.
    """

    step: Step
    loss: float
    units: float
    grad_norm: float
    waited_s: float
    requests: Requests
    measures: dict[str, tuple[float, float]]
    estimate: Estimate | None = None
    norm: Norm = RAW

    @classmethod
    def of(cls, step: Step, names: Sequence[str], norm: Norm, numbers: Sequence[float]) -> StepResult:
        """Return the result of ``step`` from ``numbers``, in the order of ``_numbers``."""
        loss, units, grad_norm, waited_s, stop, save, finish, *rest = numbers
        measures = {name: (rest[2 * index], rest[2 * index + 1]) for index, name in enumerate(names)}
        noise = rest[2 * len(names) :]
        halves, parts_sq = (noise[0], noise[1]) if len(noise) == 2 else None, noise[0] if len(noise) == 1 else None
        measured = Update(grad_norm, parts_sq=parts_sq, halves=halves)
        return cls(
            step=step,
            loss=loss / units if units else loss,
            units=units,
            grad_norm=grad_norm,
            waited_s=waited_s,
            requests=Requests(stop > 0, save > 0, finish > 0),
            measures=measures,
            estimate=measured.estimate(step.cut),
            norm=norm,
        )


def _numbers(total: Total, update: Update) -> list[Number]:
    pairs = [number for pair in total.measures.values() for number in pair]
    noise = update.halves or ([] if update.parts_sq is None else [update.parts_sq])
    return [total.loss, total.units, update.grad_norm, total.waited_s, *total.requests, *pairs, *noise]


Pending = tuple[Step, tuple[str, ...], Norm, Tensor, torch.Event]
"""A step, the names of its measures, its norm, its numbers, and the event of their arrival on the host."""


class DelayedReadback:
    """Read each step's numbers: on the CPU at once, on an accelerator one step late, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: Pending | None = None

    def read(self, step: Step, total: Total, update: Update) -> StepResult | None:
        """Return the result of ``step``; on an accelerator that of the previous step, None at the first."""
        found, names = _numbers(total, update), tuple(total.measures)
        if self._device.type == "cpu":
            return StepResult.of(step, names, update.norm, list(map(float, found)))
        numbers = torch.stack([torch.as_tensor(number) for number in found])
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._device.type == "cuda")
        host.copy_(numbers, non_blocking=True)
        copied = torch.Event(self._device)
        copied.record()
        previous, self._pending = self._pending, (step, names, update.norm, host, copied)
        return _arrived(previous)

    def flush(self) -> StepResult | None:
        """Wait for the pending result and return it; None if there is none."""
        previous, self._pending = self._pending, None
        return _arrived(previous)


def _arrived(pending: Pending | None) -> StepResult | None:
    if pending is None:
        return None
    step, names, norm, host, copied = pending
    copied.synchronize()
    return StepResult.of(step, names, norm, host.tolist())

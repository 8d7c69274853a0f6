"""Copy each step's numbers from the device to the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        parts_sq: see ``Update``; None if it wasn't measured.
    """

    step: Step
    loss: float
    units: float
    grad_norm: float
    waited_s: float
    requests: Requests
    measures: dict[str, tuple[float, float]]
    parts_sq: float | None = None

    @classmethod
    def of(cls, step: Step, names: Sequence[str], numbers: Sequence[float]) -> StepResult:
        """Return the result of ``step`` from ``numbers``, in the order of ``_numbers``."""
        loss, units, grad_norm, waited_s, stop, save, finish, *rest = numbers
        measures = {name: (rest[2 * index], rest[2 * index + 1]) for index, name in enumerate(names)}
        return cls(
            step=step,
            loss=loss / units if units else loss,
            units=units,
            grad_norm=grad_norm,
            waited_s=waited_s,
            requests=Requests(stop > 0, save > 0, finish > 0),
            measures=measures,
            parts_sq=rest[-1] if len(rest) > 2 * len(names) else None,
        )


def _numbers(total: Total, update: Update) -> list[Number]:
    pairs = [number for pair in total.measures.values() for number in pair]
    parts = [] if update.parts_sq is None else [update.parts_sq]
    return [total.loss, total.units, update.grad_norm, total.waited_s, *total.requests, *pairs, *parts]


Pending = tuple[Step, tuple[str, ...], Tensor, torch.Event]
"""A step, the names of its measures, its numbers, and the event of their arrival on the host."""


class DelayedReadback:
    """Read each step's numbers: on the CPU at once, on an accelerator one step late, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: Pending | None = None

    def read(self, step: Step, total: Total, update: Update) -> StepResult | None:
        """Return the result of ``step``; on an accelerator that of the previous step, None at the first."""
        found, names = _numbers(total, update), tuple(total.measures)
        if self._device.type == "cpu":
            return StepResult.of(step, names, list(map(float, found)))
        numbers = torch.stack([torch.as_tensor(number) for number in found])
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._device.type == "cuda")
        host.copy_(numbers, non_blocking=True)
        copied = torch.Event(self._device)
        copied.record()
        previous, self._pending = self._pending, (step, names, host, copied)
        return _arrived(previous)

    def flush(self) -> StepResult | None:
        """Wait for the pending result and return it; None if there is none."""
        previous, self._pending = self._pending, None
        return _arrived(previous)


def _arrived(pending: Pending | None) -> StepResult | None:
    if pending is None:
        return None
    step, names, host, copied = pending
    copied.synchronize()
    return StepResult.of(step, names, host.tolist())

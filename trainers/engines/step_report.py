"""The notes that ranks exchange about a step, and the result of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from isobatch.scaling.geometry import Cut
from isobatch.scaling.noise import RAW, Estimate, Norm, estimate

Number = float | Tensor
"""A float on the CPU; on an accelerator a 0-dim float64 tensor, since reading it would wait for the device."""


Measures = Mapping[str, tuple[float | Tensor, float | Tensor]]
"""Sums and counts by name."""


class Requests(NamedTuple):
    """What a rank asks of all ranks at the end of a step; of a whole step, the number of ranks that ask for it.

    Attributes:
        stop: end this attempt, because of a signal.
        save: save a checkpoint.
        finish: end the run early, by ``stop.after``.
    """

    stop: Number = False
    save: Number = False
    finish: Number = False


@dataclass(frozen=True, slots=True)
class Note:
    """The report of one pass of one rank.

    Attributes:
        loss, units: sum of the losses over the pass's units, and their number.
        expected_units: number of units that the plan expects of the pass.
        measures: the task's own sums and counts, by name.
        waited_s: seconds that this rank waited for the pass's data.
        requests: what this rank asks for.
    """

    loss: Tensor
    units: float | Tensor
    expected_units: int
    measures: Measures = field(default_factory=dict)
    waited_s: float = 0.0
    requests: Requests = field(default_factory=Requests)


@dataclass(frozen=True, slots=True)
class Total:
    """The notes of all ranks and passes of one step, summed.

    Attributes:
        loss: sum of the losses over all units of the global batch.
        units: number of units of the global batch.
        measures: the task's own sums and counts, by name; empty on a rank that had no samples so far.
        waited_s: seconds that the ranks waited for data.
        requests: above 0 if any rank asks for it.
    """

    loss: Number
    units: Number
    measures: Measures
    waited_s: Number
    requests: Requests

    def scale(self, expected_units: int) -> Number:
        """Return the factor from the summed gradient, already divided by ``expected_units``, to the mean over units.

        It isn't finite if the loss isn't, since the step's gradient can't be used then.
        """
        if isinstance(self.units, Tensor):
            return expected_units / self.units + 0 * self.loss
        return expected_units / self.units + 0 * self.loss if self.units else math.inf


@dataclass(frozen=True, slots=True)
class Update:
    """The result of one optimizer step.

    Attributes:
        grad_norm: norm of the whole normalised gradient, before clipping.
        skipped: the gradient wasn't finite, and nothing was changed.
        parts_sq: Σ_j |p_j|²/b_j over the micro-batches (see scaling/noise.py); None if they weren't measured.
        halves: |G|² and tr Σ from the step's halves; None if they weren't measured.
        norm: the norm in which they are measured (see metric.py).
    """

    grad_norm: Number
    skipped: bool = False
    parts_sq: Number | None = None
    halves: tuple[Number, Number] | None = None
    norm: Norm = RAW

    def estimate(self, cut: Cut) -> Estimate | None:
        """Return the estimates of a step with this ``cut``; None if it wasn't measured.

        They aren't finite if a square overflows. On an accelerator this waits for the device.
        """
        if self.halves:
            return Estimate(*map(float, self.halves))
        if self.parts_sq is None:
            return None
        parts_sq, whole = float(self.parts_sq), float(self.grad_norm)
        if not math.isfinite(parts_sq):
            return Estimate(math.nan, math.nan)
        return estimate(parts_sq, whole * whole, cut.global_size, cut.filled)

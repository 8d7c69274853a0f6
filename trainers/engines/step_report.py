"""The notes that ranks exchange about a step, and the result of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Number = float | Tensor
"""A float on the CPU; on an accelerator a 0-dim float64 tensor, since reading it would wait for the device."""


@dataclass(frozen=True, slots=True)
class Note:
    """The report of one pass of one rank.

    Attributes:
        loss, units: sum of the losses over the pass's units, and their number.
        expected_units: number of units that the plan expects of the pass.
        stop: this rank was asked to stop.
        save: this rank asks for a checkpoint.
    """

    loss: Tensor
    units: float | Tensor
    expected_units: int
    stop: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True)
class Total:
    """The notes of all ranks and passes of one step, summed.

    Attributes:
        loss: sum of the losses over all units of the global batch.
        units: number of units of the global batch.
        stop, save: above 0 if any rank was asked to stop, or asks for a checkpoint.
    """

    loss: Number
    units: Number
    stop: Number
    save: Number

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
        parts_sq: Σ_j |p_j|²/b_j over the micro-batches (see scaling/noise.py); None if it wasn't measured.
    """

    grad_norm: Number
    skipped: bool = False
    parts_sq: Number | None = None

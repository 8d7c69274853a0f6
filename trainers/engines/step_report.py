"""What ranks tell each other of a step, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Number = float | Tensor
"""A float on the CPU; elsewhere, where a look would wait for the device, a 0-dim float64 tensor on it."""


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


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step found.

    Attributes:
        grad_norm: of the whole normalised gradient, before clipping.
        skipped: it wasn't finite, and nothing was changed.
        parts_sq: Σ_j |p_j|²/b_j over the micro-batches (see scaling/noise.py); None where it wasn't measured.
    """

    grad_norm: Number
    skipped: bool = False
    parts_sq: Number | None = None

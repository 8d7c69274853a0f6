"""Find the critical batch that fits measurements by batch, on a grid, with its 95 % interval. Torch-free.

Samples to a target grow with the batch as (1 + (B/B_c)^p)^(1/p), with the critical batch B_c.

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 5.1, for p = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BEYOND = 1000.0  # the critical batch is searched up to this factor outside of the batches
GRID = 1200


def candidates(batches: Sequence[float] | Array) -> Array:
    """Return the critical batches [GRID + 1] to try for measurements at these batches."""
    return np.geomspace(min(batches) / BEYOND, max(batches) * BEYOND, GRID + 1)


def growth(batch: Array | np.float64 | float, critical: Array | float, power: Array | float = 1.0) -> Array:
    """Return log (1 + (B/B_c)^p)^(1/p), the growth of the samples to a target."""
    return np.asarray(np.logaddexp(0, power * (np.log(batch) - np.log(critical))) / power)


def interval_of(criticals: Array, allowed: npt.ArrayLike) -> tuple[float | None, float | None]:
    """Return the least and the largest allowed critical batch; None for a side that is open to the grid's end."""
    inside = np.flatnonzero(allowed)
    low, high = (None if at in (0, GRID) else float(criticals[at]) for at in (inside[0], inside[-1]))
    return low, high

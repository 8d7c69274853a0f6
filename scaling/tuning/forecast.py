"""Fit how many samples a target takes at each global batch, and predict it for other batches. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isobatch.scaling.geometry import counted
from isobatch.scaling.tuning.spread import student

FEWEST = 3  # batches for two parameters
FOR_POWER = 6  # batches from which the sharpness of the bend is fitted, too
POWERS = tuple(0.5 * 2 ** (i / 8) for i in range(27))  # 0.5 to 4.8
BEYOND = 1000.0  # the critical batch is searched up to this factor outside of the batches
GRID = 1200


@dataclass(frozen=True, slots=True)
class Fit:
    """The fitted law E(B) = E_min·(1 + (B/B_crit)^p)^(1/p), E in samples to the target.

    Attributes:
        least: E_min, the samples that small batches need; None without a fit.
        critical_batch: B_crit, where a step saves as much as it costs; None if the batches don't show it.
        interval: its 95 % interval (profile likelihood, equal relative errors); a side is None if it is open.
        batches: how many it is from.
        power: p; 1 unless there are six batches or more.
        note: why there is no critical batch; "" if there is one.
    """

    least: float | None
    critical_batch: float | None
    interval: tuple[float | None, float | None]
    batches: int
    power: float = 1.0
    note: str = ""

    def predict(self, batch: float) -> float | None:
        """Return the samples that ``batch`` needs to the target; None without a critical batch."""
        if self.least is None or self.critical_batch is None:
            return None
        return self.least * _growth(batch, self.critical_batch, self.power)


def fit(batches: Sequence[float], samples_to_target: Sequence[float]) -> Fit:
    """Fit E(B) = E_min·(1 + (B/B_crit)^p)^(1/p) by least squares of log E; p = 1 for fewer than six batches.

    Args:
        batches: distinct global batches, in samples.
        samples_to_target: the samples that each of them took to one target.

    Returns:
        A fit without critical batch, and with the reason, if there are fewer than three batches or if the samples
        don't bend: they allow any critical batch above, or below, all of the batches.

    Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 5.1, for p = 1.
    """
    points = sorted(zip(batches, samples_to_target, strict=True))
    if len({batch for batch, _ in points}) < FEWEST:
        problem = f"{counted(len(points), 'batch', 'batches')} reached the target, and a fit needs {FEWEST}"
        return Fit(None, None, (None, None), len(points), note=problem)
    low, high = points[0][0] / BEYOND, points[-1][0] * BEYOND
    grid = [low * (high / low) ** (i / GRID) for i in range(GRID + 1)]
    powers = POWERS if len(points) >= FOR_POWER else (1.0,)
    errors, power = {}, {}
    for critical in grid:
        tried = {p: _error(points, critical, p) for p in powers}
        power[critical] = min(tried, key=tried.__getitem__)
        errors[critical] = tried[power[critical]]
    best = min(grid, key=errors.__getitem__)
    freedom = len(points) - (2 if len(powers) == 1 else 3)
    allowed = errors[best] * (1 + student(freedom) ** 2 / freedom) + 1e-12
    inside = [critical for critical in grid if errors[critical] <= allowed]
    bounds = (inside[0] if inside[0] > grid[0] else None, inside[-1] if inside[-1] < grid[-1] else None)
    if bounds[1] is None:
        straight = "scatter too much to show it"
        if bounds[0]:
            tells = bounds[0] >= points[0][0]  # a bound below all batches says nothing
            then = f"it may be {bounds[0]:.3g} or more" if tells else "larger batches would tell"
            straight = f"don't bend: {then}"
        return Fit(None, None, bounds, len(points), note=f"the samples to the target {straight}")
    if bounds[0] is None:
        steep = f"grow in proportion to the batch: it is {bounds[1]:.3g} or less"
        return Fit(None, None, bounds, len(points), note=f"the samples to the target {steep}")
    least = math.exp(_level(points, best, power[best]))
    return Fit(least, best, bounds, len(points), power[best])


def _growth(batch: float, critical: float, power: float) -> float:
    return float((1 + (batch / critical) ** power) ** (1 / power))


def _level(points: Sequence[tuple[float, float]], critical: float, power: float) -> float:
    """Return the log of E_min that fits best for this critical batch."""
    return sum(math.log(samples / _growth(batch, critical, power)) for batch, samples in points) / len(points)


def _error(points: Sequence[tuple[float, float]], critical: float, power: float) -> float:
    """Return the sum of squared errors of log E."""
    level = _level(points, critical, power)
    return sum((math.log(samples / _growth(batch, critical, power)) - level) ** 2 for batch, samples in points)

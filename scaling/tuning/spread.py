"""Describe repeated measurements by mean and spread, and compare two of them. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from isobatch.scaling.quantiles import student


@dataclass(frozen=True, slots=True)
class Spread:
    """Hold the mean of ``n`` values and their sample standard deviation, which one value doesn't have."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of ``values``; None if there are none."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


def half_width(one: Spread, other: Spread) -> float | None:
    """Return the half-width of the 95 % interval of the difference of two means (Welch 1947).

    h = t(ν)·√(s₁²/n₁ + s₂²/n₂), ν = (s₁²/n₁ + s₂²/n₂)² / (s₁⁴/(n₁²(n₁−1)) + s₂⁴/(n₂²(n₂−1))).

    Returns:
        None if a side has one value only, or no side has any spread: then nothing is known about chance.
    """
    if one.deviation is None or other.deviation is None:
        return None
    parts = [(side.deviation**2 / side.n, side.n) for side in (one, other) if side.deviation is not None]
    total = sum(part for part, _ in parts)
    if not total:
        return None
    freedom = 1 / sum((part / total) ** 2 / (n - 1) for part, n in parts)
    return student(freedom) * math.sqrt(total)


def alike(one: Spread, other: Spread) -> bool:
    """Return whether chance may explain the difference of two means; False also where chance isn't known."""
    half = half_width(one, other)
    return half is not None and abs(one.mean - other.mean) <= half

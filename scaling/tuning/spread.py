"""Describe repeated measurements by mean and spread, and compare two of them. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

SHARE = 0.975  # quantile that bounds a two-sided 95 % interval


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


@cache
def student(freedom: float) -> float:
    """Return the 0.975 quantile of Student's t distribution.

    >>> round(student(1), 3), round(student(2), 3), round(student(4.5), 3), round(student(100), 3)
    (12.706, 4.303, 2.66, 1.984)
    """
    low, high = 0.0, 1.0
    while _cumulative(high, freedom) < SHARE:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cumulative(middle, freedom) < SHARE else (low, middle)
    return (low + high) / 2


def _cumulative(t: float, freedom: float) -> float:
    """Return P(T ≤ t) = ½ + Γ((ν+1)/2)/(√π·Γ(ν/2)) · ∫ cos^(ν−1) θ dθ, θ from 0 to atan(t/√ν), by Simpson's rule."""
    end, parts = math.atan(t / math.sqrt(freedom)), 200
    weights = (1 if i in (0, parts) else 4 if i % 2 else 2 for i in range(parts + 1))
    powers = (math.cos(end * i / parts) ** (freedom - 1) for i in range(parts + 1))
    area = sum(map(math.prod, zip(weights, powers, strict=True))) * end / parts / 3
    return 0.5 + math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi) * area

"""Quantiles that bound 95 % intervals. Torch-free."""

from __future__ import annotations

import math
from functools import lru_cache

SHARE = 0.975  # quantile that bounds a two-sided 95 % interval
NORMAL = 1.959964  # that quantile of the normal distribution


@lru_cache(maxsize=1024)
def student(freedom: float) -> float:
    """Return the 0.975 quantile of Student's t distribution.

    It is found by Newton's method, from below: the cumulative distribution is concave there, so no step goes too far.

    >>> round(student(1), 3), round(student(2), 3), round(student(4.5), 3), round(student(100), 3)
    (12.706, 4.303, 2.66, 1.984)
    """
    t, step = NORMAL, math.inf
    while step > 1e-6 * t:
        density = math.exp(
            math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - (freedom + 1) / 2 * math.log1p(t * t / freedom)
        ) / math.sqrt(math.pi * freedom)
        step = (SHARE - _cumulative(t, freedom)) / density
        t += step
    return t


def _cumulative(t: float, freedom: float) -> float:
    """Return P(T ≤ t) = ½ + Γ((ν+1)/2)/(√π·Γ(ν/2)) · ∫ cos^(ν−1) θ dθ, θ from 0 to atan(t/√ν), by Simpson's rule.

    40 parts give quantiles within 2e-6; a run asks for one at each line of noise, so more of them aren't free.
    """
    end, parts = math.atan(t / math.sqrt(freedom)), 40
    weights = (1 if i in (0, parts) else 4 if i % 2 else 2 for i in range(parts + 1))
    powers = (math.cos(end * i / parts) ** (freedom - 1) for i in range(parts + 1))
    area = sum(map(math.prod, zip(weights, powers, strict=True))) * end / parts / 3
    return 0.5 + math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi) * area

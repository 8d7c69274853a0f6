"""Learn the critical batch of a run from its own training loss, for ``control=bandit``.

A bandit that rewards half, the same and twice the batch by the loss that each saves learns nothing within one run: the
loss of an interval varies far more than the difference between two batches. So all intervals are fitted together, with
one unknown, the critical batch B_c. A batch b makes progress n/(1 + b/B_c) with n samples (McCandlish et al. 2018), and

    log loss = a − s·log(progress) + c·log(b),

where c takes up what a change of the batch does to the noise of the loss at once. The fits' errors at all B_c of a grid
give a belief about B_c, starting from a wide prior. Trials at √2 and 1/√2 of the best batch, in the order + − − +, keep
the fit from mistaking the bend of the curve for an effect of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from isobatch.scaling.control import FEWEST, Belief
from isobatch.scaling.limits import Positive, Size

GRID = [2.0 ** (i / 2) for i in range(41)]  # critical batches that are tried: 1 to 10^6 samples
ENOUGH = 10  # intervals before the first fit
TRUST = 0.5  # share of the likelihood that is believed: the curve isn't quite the true one
PATTERN = (1, -1, -1, 1)  # trials above and below the best batch
LONGER = 1.25  # a trial takes a quarter of the run so far, so the batch changes some twenty times in a run


class Interval(NamedTuple):
    """Hold the mean loss of the samples up to a position, at one batch."""

    samples: Size
    loss: Positive
    batch: Positive


def intervals_in(lines: Iterable[Mapping[str, Any]]) -> tuple[Interval, ...]:
    """Return the intervals between the measurements of a controller in ``metrics.jsonl``, those with a loss above 0."""
    found: tuple[Interval, ...] = ()
    for line in lines:
        size, growth = line.get("global_size"), line.get("control/growth")
        if size and growth and growth > 0:
            found = extended(found, line.get("samples", 0), line.get("control/loss"), size / growth)
    return found


def extended(intervals: tuple[Interval, ...], samples: int, loss: float | None, batch: float) -> tuple[Interval, ...]:
    """Return the intervals with one more, up to ``samples``; a loss that has no logarithm is left out."""
    before = intervals[-1].samples if intervals else 0
    if loss is None or loss <= 0 or samples <= before:
        return intervals
    return (*intervals, Interval(samples, loss, batch))


def trial_of(count: int) -> int | None:
    """Return +1 or −1 if a trial above or below the best batch begins after ``count`` intervals, else None.

    >>> [count for count in range(30) if trial_of(count)]
    [5, 7, 9, 12, 15, 19, 24]
    """
    due, number = FEWEST, 0
    while due < count:
        due, number = max(due + 1, math.ceil(due * LONGER)), number + 1
    return PATTERN[number % len(PATTERN)] if due == count else None


def belief(intervals: Sequence[Interval], prior: Belief) -> Belief:
    """Return the belief about the critical batch after ``intervals``."""
    middle = math.log2(prior.critical)
    logs = [-(((math.log2(critical) - middle) / prior.doublings) ** 2) / 2 for critical in GRID]
    if len(intervals) >= ENOUGH:
        for index, critical in enumerate(GRID):
            error, count = misfit(intervals, critical)
            logs[index] -= TRUST * (count - 3) / 2 * math.log(error)
    top = max(logs)
    weights = [math.exp(log - top) for log in logs]
    mean = sum(w * math.log2(critical) for w, critical in zip(weights, GRID, strict=True)) / sum(weights)
    variance = sum(w * (math.log2(critical) - mean) ** 2 for w, critical in zip(weights, GRID, strict=True))
    return Belief(2.0**mean, max(1e-3, math.sqrt(variance / sum(weights))))


def misfit(intervals: Sequence[Interval], critical: float) -> tuple[float, float]:
    """Return the weighted sum of squared errors of the fit, and the effective number of intervals.

    Later intervals weigh more, since the curve isn't one power of the progress from its start.
    """
    before, progress, end = 0, 0.0, intervals[-1].samples
    rows: list[tuple[float, float, float, float]] = []
    for samples, loss, batch in intervals:
        step = (samples - before) / (1 + batch / critical)
        rows.append((samples / end, math.log(progress + step / 2), math.log(batch), math.log(loss)))
        before, progress = samples, progress + step
    total = sum(row[0] for row in rows)

    def covariance(i: int, j: int) -> float:
        of_i, of_j = (sum(row[0] * row[k] for row in rows) / total for k in (i, j))
        return sum(row[0] * (row[i] - of_i) * (row[j] - of_j) for row in rows)

    xx, xz, zz, xy, zy, yy = (covariance(i, j) for i, j in ((1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3)))
    if zz > 1e-9:  # the batch has changed: take out what it explains
        xx, xy, yy = xx - xz * xz / zz, xy - xz * zy / zz, yy - zy * zy / zz
    left = yy - xy * xy / xx if xx > 1e-12 else yy
    return max(left, 1e-12), total**2 / sum(row[0] ** 2 for row in rows)

"""Tell the critical batch from short trainings at several batches, branched off one checkpoint. Torch-free.

The efficiency of a branch is the share of its samples at which the smallest batch had its loss already. It falls with
the batch B as (1 + B₀/B_c)/(1 + B/B_c), with the smallest batch B₀ and the critical batch B_c.

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 2.11, for the law; Merrill et al. 2025, arXiv:2505.23971, for
branches, which judge them by a tolerance on the loss instead. That doesn't carry over from task to task.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from isobatch.scaling.tuning.critical import candidates, growth, interval_of

ADMISSIBLE = 0.5  # of the smallest batch's efficiency: a target takes twice the samples
ERROR = 0.2  # standard deviation of the log of one branch's efficiency
DEVIATIONS = 1.96  # of the 95 % interval
ALIKE = 0.97  # efficiencies above this don't differ from 1
FALL = 6.0  # times its scatter by which the smallest batch's loss has to fall, or else efficiencies are noise


class Point(NamedTuple):
    """The validation loss of averaged weights, after some samples of a branch."""

    samples: int
    loss: float


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch, and what was found of it.

    Attributes:
        k: its batch over the run's; ``batch``: in samples; ``lr``: its LR at the start.
        curve: the loss at its start, and along its samples. It ends early if it isn't finite.
        stable: its loss stayed finite and ended below its start.
        efficiency: samples at which the smallest batch had its final loss, over its own; None if it isn't stable.
        admissible: its efficiency is at least ADMISSIBLE.
    """

    k: float
    batch: int
    lr: float
    curve: tuple[Point, ...]
    stable: bool = True
    efficiency: float | None = None
    admissible: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A batch that has no branch, and why."""

    batch: int
    why: str


@dataclass(frozen=True, slots=True)
class Branching:
    """The branches of one checkpoint.

    Attributes:
        samples: where in the run they start; ``length``: of a branch.
        batch: the run's batch there; ``left_out``: batches that have no branch.
        critical_batch: the local one, at this checkpoint; None if the branches don't tell it.
        interval: 95 %; a side is None where it is open.
        lr_limit: the smallest k from which on the LR, by the run's rule, leaves stability; None if none does.
        note: why there is no critical batch; "" if there is one.
    """

    samples: int
    length: int
    batch: int
    branches: tuple[Branch, ...]
    critical_batch: float | None = None
    interval: tuple[float | None, float | None] = (None, None)
    lr_limit: float | None = None
    note: str = ""
    left_out: tuple[LeftOut, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return the branches as JSON values; ``curve`` has [samples, loss] pairs."""
        return asdict(self)


def judged(
    samples: int, length: int, batch: int, branches: Sequence[Branch], left_out: Sequence[LeftOut] = ()
) -> Branching:
    """Return what the branches of a checkpoint tell.

    Args:
        samples, length, batch, left_out: see Branching.
        branches: in any order, with their curves. All start at the same loss, and take the same samples.
    """
    ordered = sorted(branches, key=lambda branch: branch.batch)
    stable = [replace(branch, stable=branch.stable and _learns(branch)) for branch in ordered]
    found = Branching(samples, length, batch, tuple(stable), left_out=tuple(left_out))
    if hardly := _hardly_falls(stable[0].curve):
        return replace(found, note=f"{hardly}; an earlier checkpoint, or more tune.samples, tells more")
    found = replace(found, lr_limit=_limit(stable))
    told = [_efficient(branch, stable[0], length) for branch in stable]
    found = replace(found, branches=tuple(told))
    known = [(branch.batch, branch.efficiency) for branch in told[1:] if branch.efficiency is not None]
    return _fitted(found, stable[0].batch, known)


def _hardly_falls(curve: Sequence[Point]) -> str:
    """Return that the loss of the smallest batch hardly falls, with its numbers; "" if it falls.

    The samples at which it reached another batch's loss are noise then. The scatter is from the curve's second
    differences, which a smooth fall hardly changes.
    """
    losses = [point.loss for point in curve]
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    scatter = statistics.median(bends) / (0.6745 * math.sqrt(6)) if bends else 0.0  # of a normal distribution
    if losses[0] - losses[-1] > FALL * scatter:
        return ""
    course = f"from {losses[0]:.4g} to {losses[-1]:.4g} in {curve[-1].samples:,} samples"
    return f"the loss hardly falls here: {course} of the smallest batch, and it scatters by {scatter:.2g}"


def _limit(branches: Sequence[Branch]) -> float | None:
    """Return the smallest k from which on no branch is stable. One that isn't below one that is shows noise, no limit.

    Args:
        branches: by rising batch.
    """
    limit = None
    for branch in reversed(branches):
        if branch.stable:
            break
        limit = branch.k
    return limit


def _learns(branch: Branch) -> bool:
    """Return whether the loss stayed finite and ended below its start."""
    losses = [point.loss for point in branch.curve]
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def _efficient(branch: Branch, smallest: Branch, length: int) -> Branch:
    """Return the branch with its efficiency, at most 1."""
    if not branch.stable:
        return branch
    reached = first_reached(smallest.curve, branch.curve[-1].loss)
    efficiency = 1.0 if branch is smallest or reached is None else min(1.0, max(1.0, reached) / length)
    return replace(branch, efficiency=efficiency, admissible=efficiency >= ADMISSIBLE)


def first_reached(curve: Sequence[Point], loss: float) -> float | None:
    """Return the samples at which a curve first comes down to ``loss``, interpolated; None if it never does.

    >>> first_reached([Point(0, 3.0), Point(100, 2.0), Point(200, 1.0)], 1.5)
    150.0
    """
    for before, after in pairwise(curve):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss) if before.loss > loss else 0.0
            return before.samples + share * (after.samples - before.samples)
    return None


def _fitted(found: Branching, smallest: int, points: Sequence[tuple[int, float]]) -> Branching:
    """Return the branching with its critical batch, or with the reason why there is none."""
    limited = f"the LR leaves stability at {found.lr_limit:g} × the batch" if found.lr_limit is not None else ""
    if not points:
        few = "one branch learned, and a critical batch needs two: give more tune.samples"
        return replace(found, note=limited or few)
    critical, interval = fit_efficiencies(smallest, points)
    found = replace(found, interval=interval)
    sizes = [size for size, _ in points]
    if all(efficiency >= ALIKE for _, efficiency in points) or critical is None:
        if interval[0] is None and interval[1] is not None:
            return replace(found, note=f"efficiency falls in proportion to the batch: it is {interval[1]:.3g} or less")
        up_to = "up to there" if limited else f"up to a batch of {max(sizes):,}"
        at_least = f": it is {interval[0]:.3g} or more" if interval[0] else ""
        note = f"{limited and f'{limited}, and '}branches {up_to} don't differ enough{at_least}"
        return replace(found, interval=(interval[0], None), note=note)
    return replace(found, critical_batch=critical)


def fit_efficiencies(
    smallest: float, points: Sequence[tuple[float, float]]
) -> tuple[float | None, tuple[float | None, float | None]]:
    """Fit the critical batch to efficiencies by least squares of their logs.

    Args:
        smallest: the batch of efficiency 1.
        points: (batch, efficiency) of larger ones, at least one.

    Returns:
        The critical batch and its 95 % interval, from the larger of ERROR and the error that the points show. An open
        side is None; the batch is None where both or the upper side is open and no batch fits better than endless.
    """
    sizes, efficiencies = np.array(points, dtype=np.float64).T
    criticals = candidates([smallest, *sizes])
    law = growth(smallest, criticals[:, None]) - growth(sizes, criticals[:, None])
    errors = ((np.log(efficiencies) - law) ** 2).sum(-1)
    least = float(errors.min())
    variance = max(ERROR**2, least / max(1, len(points) - 1))
    bounds = interval_of(criticals, errors <= least + DEVIATIONS**2 * variance)
    return (None if None in bounds else float(criticals[errors.argmin()])), bounds


def overall(course: Sequence[Branching]) -> tuple[float | None, tuple[float | None, float | None], str]:
    """Return one critical batch of all checkpoints, its interval, and a note on it.

    It is the geometric mean of those that are known; so are the interval's ends.
    """
    known = [branching for branching in course if branching.critical_batch]
    if not known:
        return None, (None, None), course[-1].note
    low, high = (_mean([branching.interval[side] for branching in known]) for side in (0, 1))
    of = f"the mean of {len(known)} of {len(course)} checkpoints" if len(course) > 1 else ""
    return _mean([branching.critical_batch for branching in known]), (low, high), of


def _mean(values: Sequence[float | None]) -> float | None:
    known = [math.log(value) for value in values if value]
    return math.exp(sum(known) / len(known)) if len(known) == len(values) else None


def expected(smallest: float, critical: float, batch: float) -> float:
    """Return the efficiency (1 + B₀/B_c)/(1 + B/B_c) of a batch."""
    return (1 + smallest / critical) / (1 + batch / critical)

"""Tell the critical batch from short trainings at several batches, branched off one checkpoint. Torch-free.

The efficiency of a branch is the share of its samples at which the smallest batch had its loss already. It falls with
the batch B as (1 + B₀/B_c)/(1 + B/B_c), with the smallest batch B₀ and the critical batch B_c.

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 2.11, for the law; Merrill et al. 2025, arXiv:2505.23971, for
branches, which judge them by a tolerance on the loss instead. That doesn't carry over from task to task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

ADMISSIBLE = 0.5  # of the smallest batch's efficiency: a target takes twice the samples
ERROR = 0.2  # standard deviation of the log of one branch's efficiency
DEVIATIONS = 1.96  # of the 95 % interval
BEYOND = 1000.0  # the critical batch is searched up to this factor outside of the batches
GRID = 1200
FLAT = 0.97  # efficiencies above this don't differ from 1


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
class Branching:
    """The branches of one checkpoint.

    Attributes:
        samples: where in the run they start; ``length``: of a branch.
        batch: the run's batch there.
        critical_batch: None if the branches don't tell it; ``interval``: 95 %, a side is None where it is open.
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

    def plain(self) -> dict[str, Any]:
        """Return the branches as JSON values; ``curve`` has [samples, loss] pairs."""
        return asdict(self)


def judged(samples: int, length: int, batch: int, branches: Sequence[Branch]) -> Branching:
    """Return what the branches of a checkpoint tell.

    Args:
        samples, length, batch: see Branching.
        branches: in any order, with their curves. All start at the same loss, and take the same samples.
    """
    ordered = sorted(branches, key=lambda branch: branch.batch)
    stable = [replace(branch, stable=branch.stable and _learns(branch)) for branch in ordered]
    limit = _limit(stable)
    found = Branching(samples, length, batch, tuple(stable), lr_limit=limit)
    if not stable[0].stable:
        longer = "give more tune.samples, or a checkpoint with more to learn"
        return replace(found, lr_limit=None, note=f"the smallest batch learned nothing in {length:,} samples: {longer}")
    told = [_efficient(branch, stable[0], length) for branch in stable]
    found = replace(found, branches=tuple(told))
    known = [(branch.batch, branch.efficiency) for branch in told[1:] if branch.efficiency is not None]
    return _fitted(found, stable[0].batch, known)


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
    critical, interval = fit(smallest, points)
    found = replace(found, interval=interval)
    sizes = [size for size, _ in points]
    if all(efficiency >= FLAT for _, efficiency in points) or critical is None:
        if interval[0] is None and interval[1] is not None:
            return replace(found, note=f"efficiency falls in proportion to the batch: it is {interval[1]:.3g} or less")
        up_to = "up to there" if limited else f"up to a batch of {max(sizes):,}"
        at_least = f": it is {interval[0]:.3g} or more" if interval[0] else ""
        note = f"{limited and f'{limited}, and '}branches {up_to} don't differ enough{at_least}"
        return replace(found, interval=(interval[0], None), note=note)
    return replace(found, critical_batch=critical)


def fit(
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
    low, high = smallest / BEYOND, max(size for size, _ in points) * BEYOND
    grid = [low * (high / low) ** (i / GRID) for i in range(GRID + 1)]
    errors = [_error(smallest, critical, points) for critical in grid]
    least = min(errors)
    variance = max(ERROR**2, least / max(1, len(points) - 1))
    inside = [critical for critical, error in zip(grid, errors, strict=True)
              if error <= least + DEVIATIONS**2 * variance]  # fmt: skip
    bounds = (inside[0] if inside[0] > grid[0] else None, inside[-1] if inside[-1] < grid[-1] else None)
    best = grid[errors.index(least)]
    return (best if bounds[0] is not None and bounds[1] is not None else None), bounds


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


def _error(smallest: float, critical: float, points: Sequence[tuple[float, float]]) -> float:
    return sum(math.log(efficiency / expected(smallest, critical, size)) ** 2 for size, efficiency in points)

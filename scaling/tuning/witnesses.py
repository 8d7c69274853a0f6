"""Measurements of a run's critical batch, what they say together, and what a law says beside them. Torch-free."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from isobatch.scaling.geometry import counted

if TYPE_CHECKING:
    from isobatch.scaling.plan import Plan

AGREE = 2.0  # factor between witnesses up to which they agree

Stretches = Sequence[tuple[int, int]]
"""The course of a run's batch: (global batch, samples trained at it), in order."""


def stretches_of(plan: Plan) -> list[tuple[int, int]]:
    """Return the global batch of each stage of a plan, with the samples of the stage."""
    assert plan.samples is not None
    ends = [stage.start for stage in plan.stages[1:]] + [plan.samples]
    return [(stage.cut.global_size, end - stage.start) for stage, end in zip(plan.stages, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class Witness:
    """A measurement of the critical batch.

    Attributes:
        name: what measured it.
        critical: the critical batch, in samples.
        low, high: its 95 % interval; None: not known.
    """

    name: str
    critical: float
    low: float | None = None
    high: float | None = None


def over_run(course: Sequence[tuple[float, float]], stretches: Stretches) -> float | None:
    """Return the critical batch of a whole run from the course of its noise scale φ, which is constant after its end.

    A step at batch B makes 1/(1 + φ/B) of the progress of a step without noise. So ds samples at the run's own batch B₀
    make ds/(B₀ + φ) of it, and the critical batch, the mean of φ over the progress, is Σ φ·w / Σ w, w = ds/(B₀ + φ).

    Args:
        course: (samples trained, noise scale), by ascending samples.
        stretches: B₀ along the run.

    Returns:
        None if the noise scale isn't known anywhere.

    Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.3 and appendix D.

    >>> over_run([(100, 50.0), (200, 150.0)], [(50, 400)])
    110.0
    """
    if not course:
        return None
    changes, known = list(accumulate(samples for _, samples in stretches)), [at for at, _ in course[:-1]]
    ends = sorted({0, *changes, *known, course[-1][0]})
    total = progress = 0.0
    for start, end in pairwise(ends):
        batch = stretches[min(bisect_left(changes, end), len(stretches) - 1)][0]
        scale = course[min(bisect_left(known, end), len(course) - 1)][1]
        part = (end - start) / (batch + scale)
        total, progress = total + scale * part, progress + part
    return total / progress


def agreement(witnesses: Sequence[Witness]) -> str:
    """Return a sentence that tells how far measurements of the critical batch agree, the most trusted one first."""
    said = ", ".join(f"{one.name} {one.critical:,.0f}{interval(one.low, one.high)}" for one in witnesses)
    if not witnesses:
        return "no critical batch was measured"
    if len(witnesses) == 1:
        return f"one measurement of the critical batch: {said}"
    low, high = (pick(one.critical for one in witnesses) for pick in (min, max))
    verdict = "agree within" if high <= AGREE * low else "disagree by"
    used = "" if high <= AGREE * low else f"; the recommendation uses {witnesses[0].name}"
    return f"{counted(len(witnesses), 'measurement')} {verdict} × {high / low:.2g}: {said}{used}"


def unknowns(noise: Mapping[str, Any], branch: Mapping[str, Any]) -> list[str]:
    """Return what measured parts couldn't tell of the critical batch.

    Args:
        noise, branch: the results of these parts; empty if they weren't measured.
    """
    said = list[str]()
    if noise and noise["scale"] is None:
        rest = ", so the one over the whole run has no interval" if noise["over_run"] else ""
        said.append(f"the noise scale isn't known at the end of its measurement{rest}")
    if branch and branch["critical_batch"] is None:
        checkpoints = "; ".join(f"from sample {one['samples']:,}, {one['note']}" for one in branch["course"])
        said.append(f"branches tell no critical batch: {checkpoints}")
    return said


def law_compared(batch: float, low: float, high: float, frugal: int | None) -> str:
    """Return how the law's batch compares with the largest one that takes few samples.

    The law's batch has the lowest loss after a given amount of data. That isn't the critical batch, at which a step
    saves as much as it costs, so it isn't a witness: a batch that takes few samples is what it tells of.

    Args:
        frugal: the largest batch that takes few samples; None: not known.
    """
    said = f"law {batch:,.0f}{interval(low, high)}: the batch of the lowest loss for this data, not the critical batch"
    if frugal is None:
        return said
    times = batch / frugal
    verdict = "agrees with" if 1 / AGREE <= times <= AGREE else f"is {times:.2g} ×"
    return f"{said}; it {verdict} the batch of few samples, {frugal:,}"


def interval(low: float | None, high: float | None) -> str:
    """Return an interval as text."""
    low_text, high_text = ("?" if bound is None else f"{bound:,.0f}" for bound in (low, high))
    return f" [{low_text}, {high_text}]"

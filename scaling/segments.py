"""Segments: stretches of a run with one global batch each, and the step boundaries that they begin at."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from isobatch.scaling.limits import Count, Size
from isobatch.scaling.rules import Rule


@dataclass(frozen=True, slots=True)
class Segment:
    """Describe a stretch of the run with one global batch.

    It starts at the first step boundary at or after ``start_sample``. ``rule`` carries the recipe of the first
    segment's batch to ``global_size`` samples; in the first segment it carries the plan's base recipe.
    """

    start_sample: Count
    global_size: Size
    rule: Rule


def boundaries(segments: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first sample and first step of each of ``segments`` (start, global batch).

    A segment whose start lies inside a step of the previous one begins after that step. Where the next segment begins
    there, too, it has no step.
    """
    found = [(0, 0)]
    for (_, size), (wanted, _) in pairwise(segments):
        start, step = found[-1]
        steps = max(0, -(-(wanted - start) // size))
        found.append((start + steps * size, step + steps))
    return found


def samples_after(steps: int, segments: Sequence[tuple[int, int]]) -> int:
    """Return the samples seen after ``steps`` steps of ``segments`` (start, global batch)."""
    found = boundaries(segments)
    index = bisect_right(found, steps, key=lambda place: place[1]) - 1
    start, first_step = found[index]
    return start + (steps - first_step) * segments[index][1]

"""Describe a controller of the global batch, as a plan holds it. The formulas are in tuning/controllers.py."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from isobatch.scaling.limits import Number, Positive, Size
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Segment

Kind = Literal["norm-test", "noise", "variance", "goodput", "bandit"]
MOST_CHANGE = 2.0  # of one decision, since the noise scale is known to a factor of about 1.5
FEWEST = 5  # measurements of the averages before the first decision
LrMode = Literal["rule", "hold", "adascale"]
AT_THE_LIMIT = Rule("linear")  # where the batch can't grow further, the LR decays (Smith et al. 2018, arXiv:1711.00489)


@dataclass(frozen=True, slots=True)
class Belief:
    """Hold what is known of the critical batch: its median in samples, and its standard deviation in doublings."""

    critical: Positive
    doublings: Positive


@dataclass(frozen=True, slots=True)
class Control:
    """Describe how measurements move the global batch. Sizes and intervals are in samples.

    Attributes:
        least, most: bounds of the batch that the controller chooses.
        quantum: chosen batches are multiples of it, except for the bounds.
        every: interval between measurements; a decision takes effect this long after its measurement.
        patience: measurements in a row that ask for a change in the same direction before it is made; not of bandit.
        lr: how the LR follows: by the run's rule, not at all, or by AdaScale's gain.
        power: exponent of AdaScale's gain: 1 for SGD, ½ for Adam.
        eta, factor, alpha: parameters of norm-test, noise and variance.
        half_speed: the global batch at which the hardware reaches half of its highest speed, of goodput and bandit;
            None: measured by the clock.
        per: what bandit saves: samples or seconds.
        prior: what bandit knows of the critical batch before it starts.
        limit: the largest global batch of a schedule that multiplies the chosen one; None without one.
    """

    name: Kind
    least: Size
    most: Size
    quantum: Size
    every: Size
    patience: Size
    lr: LrMode
    power: Number | None = None
    eta: Positive | None = None
    factor: Positive | None = None
    alpha: Positive | None = None
    half_speed: Positive | None = None
    per: Literal["sample", "second"] | None = None
    prior: Belief | None = None
    limit: Size | None = None

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"a controller can't keep the batch between {self.least} and {self.most}")

    @property
    def by_noise(self) -> bool:
        """Return True if the controller needs the gradient noise, measured from two halves of a step."""
        return self.name != "bandit" or self.lr == "adascale"

    @property
    def by_clock(self) -> bool:
        """Return True if decisions depend on the speed of the hardware."""
        timed = self.name == "goodput" or self.per == "second"
        return timed and self.half_speed is None

    @property
    def in_a_row(self) -> int:
        """Return the measurements in a row that have to ask for a change; bandit decides at its own times."""
        return 1 if self.name == "bandit" else self.patience

    def allowed(self, size: float) -> int:
        """Return the batch nearest to ``size`` samples that the controller may choose.

        >>> Control("noise", 20, 100, 8, 400, 2, "rule").allowed(50)
        48
        """
        near = min(self.most, max(self.least, round(size / self.quantum) * self.quantum))
        return min((near, self.least, self.most), key=lambda one: abs(one - size))


class Part(NamedTuple):
    """Describe a part of a run's course: a segment, and the moves from the first segment's recipe to its own."""

    segment: Segment
    moves: tuple[tuple[Rule, int], ...]

    @property
    def alone(self) -> Segment:
        """Return the segment with the rule of its only move; if there are several, with that of the schedule."""
        start, size, rule = self.segment.start_sample, self.segment.global_size, self.segment.rule
        return Segment(start, size, self.moves[0][0] if self.moves[0][1] == size else rule)


def course_of(segments: Sequence[Segment], decisions: Sequence[Segment], granule: int, limit: int | None) -> list[Part]:
    """Return the parts of a run, as decided so far.

    Args:
        segments: as asked for: a single one, or those of a schedule that doubles the batch.
        decisions: segments with the batches that the controller chose. Where the schedule multiplies the first batch by
            a factor, it multiplies a chosen batch by the same factor, up to ``limit``.
        granule: samples that must not be split.
    """
    if not decisions:
        return [Part(segment, ((segment.rule, segment.global_size),)) for segment in segments]
    found: list[Part] = []
    for start in sorted({one.start_sample for one in (*segments, *decisions)}):
        segment = _at(segments, start)
        chosen = _at(decisions, start) if start >= decisions[0].start_sample else segments[0]
        whole = multiplied(segments, start, chosen.global_size, granule)
        size = min(whole, limit or whole)
        moves: tuple[tuple[Rule, int], ...] = ((segment.rule, whole), (AT_THE_LIMIT, size))
        if chosen is not segments[0]:
            moves = ((chosen.rule, chosen.global_size), *moves)
        found.append(Part(Segment(start, size, segment.rule), moves))
    return found


def multiplied(segments: Sequence[Segment], sample: int, size: int, granule: int) -> int:
    """Return the global batch at ``sample`` that a schedule makes of a chosen batch of ``size`` samples."""
    return max(1, round(size * growth_at(segments, sample) / granule)) * granule


def growth_at(segments: Sequence[Segment], sample: int) -> float:
    """Return the factor by which a schedule multiplies a chosen batch at ``sample``."""
    return _at(segments, sample).global_size / segments[0].global_size


def _at(segments: Sequence[Segment], sample: int) -> Segment:
    return segments[bisect_right(segments, sample, key=lambda segment: segment.start_sample) - 1]

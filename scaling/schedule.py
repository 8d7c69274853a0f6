"""Schedules over the samples of a run, not its steps: the learning rate, and the global batch by segments."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import Count, NotNegative, Positive, Share, Size, Text
from isobatch.scaling.rules import Rule

LARGEST_POWER = 30  # milestones may multiply the LR by at most 10^30


@dataclass(frozen=True, slots=True)
class Schedule:
    """Describe an LR schedule: linear warmup to the peak, then a decay to ``final`` × peak.

    Attributes:
        samples: length of the run, in samples.
        warmup_samples: the LR rises linearly over [0, warmup_samples) and decays over the rest of the run.
        warmup_from: LR at sample 0 (Goyal et al. 2017: the small batch's LR).
        decay: a name of DECAYS.
        final: share of the peak at the end (not for ``step`` and ``constant``).
        exponent: exponent of ``polynomial``.
        milestones: samples at which ``step`` multiplies the LR by ``gamma``.
        cooldown_samples: length of the decay of ``wsd``.
        held_until: sample until which the LR stays at its peak because larger batches replace the decay; after it the
            LR decays from the peak. 0: the LR isn't held.
    """

    samples: Size
    warmup_samples: Count
    warmup_from: NotNegative
    decay: Text
    final: Share
    exponent: Positive
    milestones: tuple[Count, ...]
    gamma: Positive
    cooldown_samples: Count
    held_until: Count = 0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"lr.decay={self.decay}: known decays are {', '.join(DECAYS)}")
        if self.warmup_samples > self.samples:
            problem = f"lr.warmup takes {self.warmup_samples} samples, but the run has {self.samples}"
            raise UserError(problem, "shorten it, or give it in % of the run", "lr.warmup")
        if self.decay == "wsd" and self.warmup_samples + self.cooldown_samples > self.samples:
            both = f"lr.warmup ({self.warmup_samples} samples) and lr.cooldown ({self.cooldown_samples})"
            problem = f"{both} are together longer than the run ({self.samples})"
            raise UserError(problem, "shorten one of them", "lr.cooldown")
        if any(later < earlier for earlier, later in pairwise((self.warmup_samples, *self.milestones))):
            problem = f"lr.milestones are at samples {list(self.milestones)}"
            fix = f"they have to rise, and start after lr.warmup ({self.warmup_samples} samples)"
            raise UserError(problem, fix, "lr.milestones")
        if self.held_until > self.samples:
            raise ValueError(f"the LR is held until sample {self.held_until}, but the run has {self.samples}")
        if self.decay == "step" and len(self.milestones) * math.log10(self.gamma) > LARGEST_POWER:
            milestones = f"lr.gamma={self.gamma:g} at {len(self.milestones)} milestones"
            problem = f"{milestones} multiplies the LR by more than 1e{LARGEST_POWER}"
            raise UserError(problem, "use a smaller lr.gamma", "lr.gamma", self.gamma)

    def lr(self, sample: int, peak: float) -> float:
        """Return the LR at ``sample`` of a run whose peak LR is ``peak``."""
        if sample < self.warmup_samples:
            return self.warmup_from + (peak - self.warmup_from) * sample / self.warmup_samples
        if sample < self.held_until:
            return peak
        return peak * self.decayed(sample) / (self.decayed(self.held_until) if self.held_until else 1.0)

    def decayed(self, sample: int) -> float:
        """Return the LR at ``sample`` as a share of the peak, by the decay alone."""
        return DECAYS[self.decay](self, sample)

    def falls_to(self, share: float) -> int | None:
        """Return the first sample after the warmup at which the decay is at most ``share``, or None if it never is."""
        sample = bisect_left(range(self.samples), True, self.warmup_samples, key=lambda s: self.decayed(s) <= share)
        return sample if sample < self.samples else None

    def _falling(self, sample: int, start: int) -> float:
        """Return the progress t in [0, 1] of a decay from ``start`` to the end of the run."""
        return min(1.0, max(0.0, (sample - start) / max(1, self.samples - start)))

    def _between(self, remaining: float) -> float:
        """Interpolate from 1, at ``remaining`` = 1, to ``final``, at 0."""
        return self.final + (1 - self.final) * remaining


def cosine(s: Schedule, sample: int) -> float:
    """Half a cosine: ½(1 + cos πt) (Loshchilov & Hutter 2017)."""
    return s._between((1 + math.cos(math.pi * s._falling(sample, s.warmup_samples))) / 2)


def linear(s: Schedule, sample: int) -> float:
    """1 − t."""
    return s._between(1 - s._falling(sample, s.warmup_samples))


def polynomial(s: Schedule, sample: int) -> float:
    """(1 − t)^exponent."""
    return s._between((1 - s._falling(sample, s.warmup_samples)) ** s.exponent)


def step(s: Schedule, sample: int) -> float:
    """gamma^(milestones passed)."""
    return s.gamma ** sum(sample >= milestone for milestone in s.milestones)


def constant(s: Schedule, sample: int) -> float:
    """1."""
    return 1.0


def wsd(s: Schedule, sample: int) -> float:
    """Warmup-stable-decay: 1, then a linear decay over the last ``cooldown_samples`` (Hu et al. 2024)."""
    return s._between(1 - s._falling(sample, s.samples - s.cooldown_samples))


FORMS = (cosine, linear, polynomial, step, constant, wsd)
DECAYS: dict[str, Callable[[Schedule, int], float]] = {form.__name__: form for form in FORMS}


@dataclass(frozen=True, slots=True)
class Segment:
    """Describe a part of the run with one global batch.

    It starts at the first step boundary at or after ``start_sample``. ``rule`` scales the recipe of the first segment
    to ``global_size`` samples; in the first segment it scales the plan's base recipe.
    """

    start_sample: Count
    global_size: Size
    rule: Rule


def boundaries(segments: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first sample and first step of each of ``segments`` (start, global batch).

    A segment whose start lies inside a step of the previous segment starts after that step. A segment that starts where
    the next one does has no step.
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

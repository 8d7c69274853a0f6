"""The learning rate as a function of samples seen, never of steps: warmup, then one of six decays."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import Count, NotNegative, Positive, Share, Size, Text

LARGEST_POWER = 30  # of ten, by which milestones may multiply the LR


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warmup from an LR to the peak, then a decay to ``final`` × peak.

    Attributes:
        samples: length of the run that the schedule is laid over, in samples.
        warmup_samples: LR climbs linearly over [0, warmup_samples), the decay goes over the rest.
        warmup_from: LR at sample 0 (Goyal et al. 2017: the small batch's LR).
        decay: a name of DECAYS.
        final: share of the peak at the end (all but ``step`` and ``constant``).
        exponent: of ``polynomial``.
        milestones: samples at which ``step`` multiplies the LR by ``gamma``.
        cooldown_samples: length of the falling part of ``wsd``.
        held_until: sample of the last of the larger batches that stand in for the decay; 0: none do. Until it the LR
            stays at the peak, from there on it falls as the decay does.
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
            raise UserError(problem, "shorten it, or say it in % of the run", "lr.warmup")
        if self.decay == "wsd" and self.warmup_samples + self.cooldown_samples > self.samples:
            problem = (
                f"lr.warmup ({self.warmup_samples} samples) and lr.cooldown ({self.cooldown_samples}) are longer "
                f"together than the run ({self.samples})"
            )
            raise UserError(problem, "shorten one of them", "lr.cooldown")
        if any(later < earlier for earlier, later in pairwise((self.warmup_samples, *self.milestones))):
            problem = f"lr.milestones are at samples {list(self.milestones)}"
            fix = f"they have to rise, and not to come within lr.warmup ({self.warmup_samples} samples)"
            raise UserError(problem, fix, "lr.milestones")
        if self.held_until > self.samples:
            raise ValueError(f"the LR is held until sample {self.held_until}, and the run has {self.samples}")
        if self.decay == "step" and len(self.milestones) * math.log10(self.gamma) > LARGEST_POWER:
            problem = (
                f"lr.gamma={self.gamma:g} at {len(self.milestones)} milestones multiplies the LR by more than "
                f"1e{LARGEST_POWER}"
            )
            raise UserError(problem, "use a smaller lr.gamma", "lr.gamma", self.gamma)

    def lr(self, sample: int, peak: float) -> float:
        """Return the LR at ``sample`` of a run whose peak LR is ``peak``."""
        if sample < self.warmup_samples:
            return self.warmup_from + (peak - self.warmup_from) * sample / self.warmup_samples
        if sample < self.held_until:
            return peak
        return peak * self.decayed(sample) / (self.decayed(self.held_until) if self.held_until else 1.0)

    def decayed(self, sample: int) -> float:
        """Return the share of the peak that the decay leaves at ``sample``, the warmup being over."""
        return DECAYS[self.decay](self, sample)

    def falls_to(self, share: float) -> int | None:
        """Return the first sample after the warmup at which at most ``share`` of the peak is left, if there is one."""
        there = bisect_left(range(self.samples), True, self.warmup_samples, key=lambda s: self.decayed(s) <= share)
        return there if there < self.samples else None

    def _falling(self, sample: int, start: int) -> float:
        """Return the progress in [0, 1] of a fall that starts at ``start`` and ends with the run."""
        return min(1.0, max(0.0, (sample - start) / max(1, self.samples - start)))

    def _between(self, remaining: float) -> float:
        """Return ``final`` where nothing remains, 1 where all does."""
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
    """Warmup-stable-decay: 1, then a linear fall over the last ``cooldown_samples`` (Hu et al. 2024)."""
    return s._between(1 - s._falling(sample, s.samples - s.cooldown_samples))


DECAYS: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": cosine,
    "linear": linear,
    "polynomial": polynomial,
    "step": step,
    "constant": constant,
    "wsd": wsd,
}

"""The durations of a config in samples, and the schedule of the LR that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isobatch.scaling.limits import LARGEST
from isobatch.scaling.plan import Plan, Segment, samples_after
from isobatch.scaling.schedule import Schedule

if TYPE_CHECKING:
    from isobatch.conf.schema import LearningRate
    from isobatch.scaling.units import Duration


@dataclass(frozen=True, slots=True)
class Lengths:
    """Durations of one run in samples.

    Attributes:
        segments: whose steps a duration in steps counts; None where they aren't known yet.
    """

    segments: tuple[Segment, ...] | None
    train_samples: int | None
    units_per_sample: int | None
    run_samples: int | None = None

    def samples(self, said: str, duration: Duration) -> int | None:
        """See Duration.samples; ``said`` (``lr.warmup=``) stands before the duration in a refusal."""
        if self.segments is None and duration.unit == "st":
            return None
        samples = self._counted(said, duration)
        if samples is not None and samples > LARGEST:
            raise ValueError(f"{said}{duration} is {samples:.3g} samples, and can be at most {LARGEST:.0e}")
        return samples

    def _counted(self, said: str, duration: Duration) -> int | None:
        if self.segments and len(self.segments) > 1 and duration.unit == "st":
            steps, stages = math.ceil(duration.value), [(one.start_sample, one.global_size) for one in self.segments]
            return samples_after(steps, stages)
        try:
            return duration.samples(
                global_size=self.segments[0].global_size if self.segments else 1,
                train_samples=self.train_samples,
                units_per_sample=self.units_per_sample,
                run_samples=self.run_samples,
            )
        except ValueError as error:
            raise ValueError(f"{said}{error}") from None


def schedule_of(lr: LearningRate, lengths: Lengths, plan: Plan, tuned_lr: float | None) -> Schedule | None:
    """The LR over samples, or None where the run's length isn't known yet."""
    warmup = lengths.samples("lr.warmup=", lr.warmup)
    # What another decay would use isn't looked at: it may not fit this run, or not be known yet.
    cooldown = lengths.samples("lr.cooldown=", lr.cooldown) if lr.decay == "wsd" else 0
    milestones = [lengths.samples("lr.milestones=", each) for each in lr.milestones] if lr.decay == "step" else []
    if lengths.run_samples is None or warmup is None or cooldown is None or None in milestones:
        return None
    peak, warmup_from = plan.peak.lr, lr.warmup_from
    if warmup_from is None:
        warmup_from = tuned_lr if tuned_lr is not None and peak > tuned_lr else 0.0
    elif warmup and warmup_from > peak:
        raise ValueError(
            f"lr.warmup_from={warmup_from:g} is above the peak LR, to which the warmup climbs: use at most {peak}"
        )
    return Schedule(
        samples=lengths.run_samples,
        warmup_samples=_warmup(warmup, lengths.run_samples, plan),
        warmup_from=warmup_from,
        decay=lr.decay,
        final=lr.final,
        exponent=lr.exponent,
        milestones=tuple(milestones),  # type: ignore[arg-type]
        gamma=lr.gamma,
        cooldown_samples=cooldown,
    )


def _warmup(samples: int, run_samples: int, plan: Plan) -> int:
    """The warmup in samples, as the rule carries it from the batch of the tuning."""
    rule, batch = plan.segments[0].rule, plan.cut.global_size
    carried = rule.warmup(samples, plan.base_batch, batch)
    if carried > samples and carried > run_samples:
        largest = plan.base_batch * run_samples // samples
        raise ValueError(
            f"lr.rule={rule.name} makes the warmup as many times longer as the batch is larger, {carried:,} samples at "
            f"{plan.size(batch)}, and the run has {run_samples:,}; the largest batch at which it fits is "
            f"{plan.size(largest)}: use that, a longer duration, or a shorter lr.warmup"
        )
    return carried

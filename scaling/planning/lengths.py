"""Convert a config's durations to samples: its intervals and the LR's schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isobatch.conf.recipe import LearningRate
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import LARGEST
from isobatch.scaling.plan import Intervals, Plan
from isobatch.scaling.schedule import Schedule, Segment, samples_after
from isobatch.scaling.units import Duration


@dataclass(frozen=True, slots=True)
class Lengths:
    """Convert durations of one run to samples.

    Attributes:
        segments: the run's segments, which define its steps; None: not known yet.
    """

    segments: tuple[Segment, ...] | None
    train_samples: int | None
    units_per_sample: int | None
    run_samples: int | None = None

    def samples(self, label: str, duration: Duration) -> int | None:
        """Return ``duration`` in samples, or None if it isn't known yet.

        Args:
            label: text before the duration in an error, starting with its key: ``lr.warmup=``.

        Raises:
            UserError: the duration is too long, or is in tokens and the task has no fixed number of tokens per sample.
        """
        if self.segments is None and duration.unit == "st":
            return None
        key = label.partition("=")[0]
        if duration.unit == "tok" and self.units_per_sample is None:
            problem = f"{label}{duration} counts tokens, but this task has no fixed units_per_sample"
            raise UserError(problem, "use ep, st or sa", key, duration)
        samples = self._counted(duration)
        if samples is not None and samples > LARGEST:
            raise UserError(f"{label}{duration} is {samples:.3g} samples", f"use at most {LARGEST:.0e}", key, duration)
        return samples

    def _counted(self, duration: Duration) -> int | None:
        if self.segments and len(self.segments) > 1 and duration.unit == "st":
            steps, stages = math.ceil(duration.value), [(one.start_sample, one.global_size) for one in self.segments]
            return samples_after(steps, stages)
        return duration.samples(
            global_size=self.segments[0].global_size if self.segments else 1,
            train_samples=self.train_samples,
            units_per_sample=self.units_per_sample,
            run_samples=self.run_samples,
        )


def intervals_of(config: RunConfig, lengths: Lengths) -> Intervals:
    """Return the intervals of ``config`` in samples. Raise UserError if measuring the noise would change the run."""

    def samples(key: str, every: Duration | None) -> int | None:
        return None if every is None or every.unit == "min" else lengths.samples(f"{key}=", every)

    if config.noise.every and config.noise.parts and config.batchnorm.mode == "sync":
        problem = (
            "noise.parts=2 halves passes, of which batchnorm.mode=sync takes statistics, so measuring changes the run"
        )
        fix = "use noise.parts=null, or batchnorm.mode=ghost"
        raise UserError(problem, fix, "noise.parts", config.noise.parts)
    return Intervals(
        log=samples("log.every", config.log.every),
        evaluate=samples("evaluate.every", config.evaluate.every),
        save=samples("checkpoint.every", config.checkpoint.every),
        noise=samples("noise.every", config.noise.every),
        keep=samples("checkpoint.keep_every", config.checkpoint.keep_every),
        noise_parts=config.noise.parts,
    )


def schedule_of(lr: LearningRate, lengths: Lengths, plan: Plan, tuned_lr: float | None) -> Schedule | None:
    """Return the LR's schedule, or None if the run's length isn't known yet."""
    warmup = lengths.samples("lr.warmup=", lr.warmup)
    # Keys of other decays are ignored: they may not fit this run, or not be known yet.
    cooldown = lengths.samples("lr.cooldown=", lr.cooldown) if lr.decay == "wsd" else 0
    milestones = [lengths.samples("lr.milestones=", each) for each in lr.milestones] if lr.decay == "step" else []
    if lengths.run_samples is None or warmup is None or cooldown is None or None in milestones:
        return None
    peak, warmup_from = plan.peak.lr, lr.warmup_from
    if warmup_from is None:
        warmup_from = tuned_lr if tuned_lr is not None and peak > tuned_lr else 0.0
    elif warmup and warmup_from > peak:
        problem = f"lr.warmup_from={warmup_from:g} is above the peak LR"
        raise UserError(problem, f"use at most {peak}", "lr.warmup_from", warmup_from)
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
    """Return the warmup in samples, scaled by the rule from the tuned batch."""
    rule, batch = plan.segments[0].rule, plan.cut.global_size
    carried = rule.warmup(samples, plan.base_batch, batch)
    if carried > samples and carried > run_samples:
        largest = plan.base_batch * run_samples // samples
        raise UserError(
            f"lr.rule={rule.name} scales the warmup with the batch to {carried:,} samples at {plan.size(batch)}, but "
            f"the run has only {run_samples:,}",
            f"the largest batch at which it fits is {plan.size(largest)}: use that, a longer duration, or a shorter "
            "lr.warmup",
            "lr.rule",
            rule.name,
        )
    return carried

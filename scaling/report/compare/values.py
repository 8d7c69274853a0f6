"""Average the values of a group: its measure, its speed, and what it took to reach a target. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from isobatch.conf.rundir.reading import HUGE
from isobatch.scaling.report.compare.groups import Group
from isobatch.scaling.report.compare.measure import Metric
from isobatch.scaling.report.measures import first_reaching
from isobatch.scaling.stopping import Target
from isobatch.scaling.tuning.spread import Spread


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a group, over its counted runs. A Spread is None if no run has the value.

    Attributes:
        open: no run is counted, so the values are those of runs that haven't finished; they are shown, not compared.
        last, best: of the measure, at the end and at each run's best evaluation.
        steps, samples, time_s: of the whole run; ``samples_per_s``: its speed; ``epoch_s``: seconds per epoch.
        noise_scale, gradient_variance: as last measured; ``sharpness``, ``perturbed``: as measured at the end.
        reached: counted runs that reached the target; ``to_steps``, ``to_samples``, ``to_time_s``: what that
            took, where all of them did, and the time of each is known.
    """

    open: bool
    last: Spread | None
    best: Spread | None
    steps: Spread | None
    samples: Spread | None
    time_s: Spread | None
    samples_per_s: Spread | None
    epoch_s: Spread | None
    noise_scale: Spread | None
    gradient_variance: Spread | None
    sharpness: Spread | None
    perturbed: Spread | None
    reached: int
    to_steps: Spread | None
    to_samples: Spread | None
    to_time_s: Spread | None


def values_of(group: Group, metric: Metric | None, target: Target | None) -> Values:
    """Return the values of a group."""
    runs = group.counted or [run for run in group.runs if not run.done.diverged]
    measures = [run.measures[metric.name] for run in runs if metric and metric.name in run.measures]
    ends = [record for run in runs if target and (record := first_reaching(target, run.measures))]
    whole = len(ends) == len(runs) and bool(group.counted)  # a mean over those that made it would be too good
    return Values(
        open=not group.counted,
        last=_spread(one.last for one in measures),
        best=_spread(one.best and one.best.value for one in measures),
        steps=_spread(run.done.step for run in runs),
        samples=_spread(run.done.samples for run in runs),
        time_s=_spread(run.done.time_s for run in runs),
        samples_per_s=_spread(run.done.samples_per_s for run in runs),
        epoch_s=_spread(run.done.time_s / run.done.epoch for run in runs if run.done.time_s and run.done.epoch),
        noise_scale=_spread(run.done.noise_scale for run in runs),
        gradient_variance=_spread(run.done.gradient_variance for run in runs),
        sharpness=_spread(run.done.sharpness for run in runs),
        perturbed=_spread(run.done.perturbed for run in runs),
        reached=len(ends),
        to_steps=_spread(end.step for end in ends) if whole else None,
        to_samples=_spread(end.samples for end in ends) if whole else None,
        to_time_s=_spread(end.time_s for end in ends) if whole and None not in [end.time_s for end in ends] else None,
    )


def _spread(values: Iterable[float | None]) -> Spread | None:
    return Spread.of([value for value in values if value is not None and abs(value) <= HUGE])

"""Add up what a run logs: time, units, losses and measures, of the whole run and since the last logged step.

A checkpoint holds these sums, so a resumed run logs the same lines as one that never stopped. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isobatch.scaling.limits import Count

Pair = tuple[float, float]
"""A sum, and the number of units or samples that it is over."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Hold sums over the steps since the last logged one.

    Attributes:
        samples, units: of all steps.
        seconds: time of training; ``waited_s``: the part of it that a rank waited for data, the mean over ranks.
        loss: sum of the losses over units, and the number of these units, of the steps whose loss was finite.
        measures: the task's own, by name.
    """

    samples: Count = 0
    units: float = 0.0
    seconds: float = 0.0
    waited_s: float = 0.0
    loss: Pair = (0.0, 0.0)
    measures: dict[str, Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (self.samples, self.units, self.seconds, self.waited_s)
        sums = (number for pair in (self.loss, *self.measures.values()) for number in pair)
        if min(counts) < 0 or not (all(map(math.isfinite, counts)) and all(map(math.isfinite, sums))):
            raise ValueError(f"{self} isn't a valid interval of a tally")

    def after(
        self, samples: int, units: float, loss: float, measures: Mapping[str, Pair], seconds: float, waited_s: float
    ) -> Interval:
        """Return the interval with one more step; see ``Tally.after``."""
        finite = {name: pair for name, pair in measures.items() if all(map(math.isfinite, pair))}
        return Interval(
            self.samples + samples,
            self.units + units,
            self.seconds + seconds,
            self.waited_s + waited_s,
            _plus(self.loss, (loss, units)) if math.isfinite(loss) else self.loss,
            self.measures | {name: _plus(self.measures.get(name, (0.0, 0.0)), finite[name]) for name in finite},
        )

    @property
    def mean_loss(self) -> float:
        """Return the mean loss over units; NaN if no loss was finite."""
        return _mean(self.loss)


@dataclass(frozen=True, slots=True)
class Tally:
    """Hold the sums of a run at a position.

    Attributes:
        time_s: seconds of training so far, over all attempts, without evaluations and without steps that were lost.
        units: units seen so far, such as tokens.
        controlled: sums since the last measurement of the batch's controller; None without a controller.
    """

    time_s: float = 0.0
    units: float = 0.0
    interval: Interval = field(default_factory=Interval)
    controlled: Interval | None = None

    def __post_init__(self) -> None:
        if min(self.time_s, self.units) < 0 or not (math.isfinite(self.time_s) and math.isfinite(self.units)):
            raise ValueError(f"{self} isn't a valid tally")

    def after(
        self, samples: int, units: float, loss: float, measures: Mapping[str, Pair], seconds: float, waited_s: float
    ) -> Tally:
        """Return the tally after one more step.

        Args:
            units: number of units of the global batch.
            loss: sum of the losses over them. Numbers that aren't finite are left out.
            measures: the task's sums and counts.
            seconds: time since the previous step.
            waited_s: time that a rank waited for the step's data.
        """
        step = samples, units, loss, measures, seconds, waited_s
        controlled = self.controlled and self.controlled.after(*step)
        return Tally(self.time_s + seconds, self.units + units, self.interval.after(*step), controlled)

    def logged(self) -> Tally:
        """Return the tally after the step was logged: a new interval starts."""
        return replace(self, interval=Interval())

    def measured(self) -> Tally:
        """Return the tally after a measurement of the batch's controller."""
        return replace(self, controlled=Interval())

    def values(self) -> dict[str, float]:
        """Return the values of a line of ``metrics.jsonl``; a mean over nothing is NaN."""
        since = self.interval
        seconds = max(1e-9, since.seconds)
        return {
            "loss": since.mean_loss,
            "samples_per_s": since.samples / seconds,
            "time_s": self.time_s,
            "units": self.units,
            "units_per_s": since.units / seconds,
            "data_wait": min(1.0, since.waited_s / seconds),
            **{f"train/{name}": _mean(pair) for name, pair in since.measures.items()},
        }


def _plus(one: Pair, other: Pair) -> Pair:
    return one[0] + other[0], one[1] + other[1]


def _mean(pair: Pair) -> float:
    return pair[0] / pair[1] if pair[1] else math.nan

"""What a comparison of runs found, as data. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from isobatch.scaling.report.compare.groups import Group
from isobatch.scaling.report.compare.measure import Metric
from isobatch.scaling.report.compare.values import Values
from isobatch.scaling.report.run import Run
from isobatch.scaling.stopping import Target
from isobatch.scaling.tuning.forecast import Fit, Forecast
from isobatch.scaling.tuning.spread import Spread


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of the runs of one task, or a fit to points that were given without runs: then without groups.

    Attributes:
        task: the task's name, with its class where two tasks share a name.
        metric: what the runs are compared by; None if they measured nothing.
        target: what ``values`` say how long it took; ``target_from``: the key that gave it; "" if none did.
        values: of each group.
        fits: samples to the target by batch, by family, of the groups in ``quickest``.
        forecasts: what the target is predicted to take, by family and batch; none where there is no critical batch.
        findings: sentences on what was found and how sure it is; ``warnings``: on what to be careful about.
    """

    task: str
    metric: Metric | None
    target: Target | None
    target_from: str
    groups: list[Group]
    values: list[Values]
    fits: dict[str, Fit]
    forecasts: dict[str, list[Forecast]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    def pairs(self) -> Iterator[tuple[Group, Values]]:
        """Yield each group with its values."""
        return zip(self.groups, self.values, strict=True)

    def ranked(self) -> list[tuple[Group, Spread]]:
        """Return the groups that have a value of the metric at the end, the best first; equal ones by their place."""
        known = [(group, values.last) for group, values in self.pairs() if values.last and not values.open]
        sign = -1 if self.metric is not None and self.metric.direction == "max" else 1
        return sorted(known, key=lambda pair: (sign * pair[1].mean, *pair[0].place))

    def best_lrs(self) -> list[tuple[Group, Values]]:
        """Return the groups with the best learning rate of each family and batch, by the metric at the end.

        Where no group of a batch has a value, its first one stands for it.
        """
        return self._of_each_batch([group for group, _ in self.ranked()])

    def quickest(self) -> list[tuple[Group, Values]]:
        """Return the groups that took the fewest samples to the target of each family and batch that reached it."""
        known = [(values.to_samples.mean, group) for group, values in self.pairs() if values.to_samples]
        order = [group for _, group in sorted(known, key=lambda pair: (pair[0], *pair[1].place))]
        return [(group, values) for group, values in self._of_each_batch(order) if values.to_samples]

    def _of_each_batch(self, order: list[Group]) -> list[tuple[Group, Values]]:
        """Return the group of each family and batch that comes first in ``order``, or else in the comparison."""
        places = {id(group): place for place, group in enumerate(order)}
        best: dict[tuple[str, int | None], tuple[Group, Values]] = {}
        for group, values in sorted(self.pairs(), key=lambda pair: places.get(id(pair[0]), len(places))):
            best.setdefault((group.family, group.global_size), (group, values))
        return sorted(best.values(), key=lambda pair: (pair[0].family, *pair[0].place))


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """A report on runs, one comparison for each task.

    Attributes:
        chosen: how many of the runs that were found it is on, and by which conditions; "" if on all.
        warnings: what to know before believing the tables.
        text: the report as a table for the terminal, which ``print(report)`` shows; ``json``: that of report.json.
        directory: where it was written; None if it wasn't. ``files``: the names of its files there.
    """

    runs: list[Run]
    comparisons: list[Comparison]
    warnings: list[str]
    chosen: str = ""
    text: str = ""
    json: str = ""
    directory: Path | None = None
    files: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return self.text

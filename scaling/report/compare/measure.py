"""Choose the measure that runs are compared by, and the target that they should reach. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from isobatch.scaling.errors import UserError
from isobatch.scaling.report.measures import Direction, direction_of, names_there
from isobatch.scaling.report.run import Run
from isobatch.scaling.stopping import NAME, Target

METRIC = re.compile(rf"({NAME})(?::(min|max))?")


class Metric(NamedTuple):
    """The name of a measure, and which direction of it is better."""

    name: str
    direction: Direction


class Asked(NamedTuple):
    """What ``report.metric`` and ``report.target`` ask for.

    Attributes:
        metric: the name of a measure; ``direction``: which one is better, if the user said so.
        in_order: groups stay in the order of the runs, which the user chose.
    """

    metric: str | None = None
    direction: Direction | None = None
    target: Target | None = None
    in_order: bool = False

    @property
    def directions(self) -> dict[str, Direction]:
        """Return which direction of a measure is better, as far as it was said."""
        found = {self.target.name: self.target.direction} if self.target else {}
        return found | ({self.metric: self.direction} if self.metric and self.direction else {})


def asked(metric: str | None, target: str | None) -> Asked:
    """Return what ``report.metric`` and ``report.target`` ask for.

    Args:
        metric: the measure to compare by, ``name`` or ``name:min|max``; None chooses one.
        target: what to reach, such as ``val/accuracy>=0.97``; None chooses one.

    Raises:
        UserError: one of them can't be read, or they contradict each other.
    """
    match = METRIC.fullmatch(metric) if metric else None
    if metric and not match:
        problem = f"report.metric={metric!r:.200} isn't the name of a measure"
        raise UserError(problem, "write it as in val/accuracy or val/score:max", "report.metric", metric)
    direction: Direction | None = "min" if match and match[2] == "min" else "max" if match and match[2] else None
    found = Asked(match and match[1], direction)
    return found._replace(target=_target(target, found)) if target else found


def _target(text: str, other: Asked) -> Target:
    """Return the target in ``report.target``. Raises UserError."""
    target = Target.parse(text.strip())
    if not target:
        problem = f"report.target={text!r:.200} isn't a value to reach"
        raise UserError(problem, "write it as in 'val/accuracy>=0.97', with a finite number", "report.target", text)
    said = other.direction if other.metric == target.name else None
    better = said or direction_of(target.name)
    if better and better != target.direction:
        more, why = ("more" if better == "max" else "less"), f" (report.metric={target.name}:{said})" if said else ""
        problem = f"report.target={text}: of {target.name}, {more} is better{why}"
        turned = f"{target.name}{'>=' if better == 'max' else '<='}{target.value:g}"
        fix = f"write report.target='{turned}', or report.metric={target.name}:{target.direction}"
        raise UserError(problem, fix, "report.target", text)
    return target


def refuse_unknown(runs: Sequence[Run], wanted: Asked) -> None:
    """Raise UserError if no run has the measure that is asked for, or if it isn't known which direction is better."""
    known = sorted({name for run in runs for name in run.measures})
    names = {"report.metric": wanted.metric, "report.target": wanted.target and wanted.target.name}
    for key, name in names.items():
        if name and known and name not in known:
            raise UserError(f"{key}: no run has measured {name}", names_there(name, known), key, name)
    name = wanted.metric
    if name and name not in wanted.directions and direction_of(name) is None:
        fix = f"say which is better: report.metric={name}:max or {name}:min"
        raise UserError(
            f"report.metric={name}: its name doesn't tell whether more is better", fix, "report.metric", name
        )


def metric_of(runs: Sequence[Run], asked: str | None) -> Metric | None:
    """Return the measure to compare the runs of one task by; None if they measured nothing.

    Args:
        asked: a name, used if a run has it. Otherwise an evaluation's measure of which more is better (an accuracy)
            is used, then an evaluation's loss, then the training loss.
    """
    known: dict[str, Direction] = {}
    for run in runs:
        known |= {name: one.direction for name, one in run.measures.items() if one.direction is not None}
    ranked = sorted(known, key=lambda name: (name != asked, _rank(name, known[name])))
    return Metric(ranked[0], known[ranked[0]]) if ranked else None


def _rank(name: str, direction: Direction) -> int:
    of_evaluation = name.startswith("val/")
    return 0 if of_evaluation and direction == "max" else 1 if of_evaluation else 2 if name == "loss" else 3


def common_stop(runs: Sequence[Run]) -> Target | None:
    """Return the target at which ``stop.at`` ends all of the runs; None if they have none in common."""
    texts = {run.recipe.stop_at for run in runs}
    target = Target.parse(texts.pop() or "") if len(texts) == 1 else None
    directions = {run.measures[target.name].direction for run in runs if target and target.name in run.measures}
    return target if target and directions == {target.direction} else None


def usual_target(counted: Sequence[Run], metric: Metric) -> Target | None:
    """Return a target for runs that were given none: the worst of their best values.

    A run is left out if its best value is less than half of the way from the worst first value of all runs to the best
    value of all.
    """
    measured = [run.measures[metric.name].records for run in counted if metric.name in run.measures]
    sign = 1 if metric.direction == "max" else -1
    bests = [sign * records[-1].value for records in measured if records]
    if not bests:
        return None
    halfway = max(bests) / 2 + min(sign * records[0].value for records in measured if records) / 2
    worst = min(best for best in bests if best >= halfway)
    return Target(metric.name, ">=" if sign > 0 else "<=", sign * worst)

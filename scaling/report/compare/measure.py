"""Choose the measure that runs are compared by, and the target that they should reach. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import one_line
from isobatch.scaling.report.measures import Direction, Target, direction_of
from isobatch.scaling.report.run import Run

METRIC = re.compile(r"([^:\s]+?)(?::(min|max))?")
TARGET = re.compile(r"([^\s<>=]+)\s*(<=|>=|<|>)\s*(\S+)")


class Metric(NamedTuple):
    """The name of a measure, and which direction of it is better."""

    name: str
    direction: Direction


def parse_metric(text: str) -> tuple[str, Direction | None]:
    """Return the name and the direction in ``report.metric``, such as ``val/score:max``. Raises UserError."""
    match = METRIC.fullmatch(text)
    if not match:
        problem = f"report.metric={text!r:.200} isn't the name of a measure"
        raise UserError(problem, "write it as in val/accuracy or val/score:max", "report.metric", text)
    direction: Direction | None = "min" if match[2] == "min" else "max" if match[2] else None
    return match[1], direction


def parse_target(text: str) -> Target:
    """Return the target in ``report.target``, such as ``val/accuracy>=0.97``. Raises UserError."""
    match = TARGET.fullmatch(text.strip())
    try:
        return Target(match[1], match[2], float(match[3]))  # type: ignore[index]
    except (TypeError, ValueError):
        problem = f"report.target={text!r:.200} isn't a value to reach"
        raise UserError(problem, "write it as in 'val/accuracy>=0.97'", "report.target", text) from None


def directions_asked(metric: str | None, target: str | None) -> dict[str, Direction]:
    """Return which direction of a measure is better, as far as ``report.metric`` and ``report.target`` say it."""
    found: dict[str, Direction] = {}
    if target:
        parsed = parse_target(target)
        found[parsed.name] = parsed.direction
    if metric and (named := parse_metric(metric))[1]:
        found[named[0]] = named[1]
    return found


def refuse_unknown(runs: Sequence[Run], metric: str | None, target: str | None) -> None:
    """Raise UserError if no run has the measure that is asked for, or if it isn't known which direction is better."""
    wanted = {
        "report.metric": metric and parse_metric(metric)[0],
        "report.target": target and parse_target(target).name,
    }
    for key, name in wanted.items():
        known = sorted({known for run in runs for known in run.measures})
        if name and known and name not in known:
            near = "".join(f"did you mean {match}? " for match in get_close_matches(name, known, n=1))
            there = ", ".join(map(one_line, known))
            raise UserError(f"{key}: no run has measured {name}", f"{near}there are {there}", key, name)
    if metric and not target and None in parse_metric(metric) and direction_of(parse_metric(metric)[0]) is None:
        fix = f"say which is better: report.metric={metric}:max or {metric}:min"
        raise UserError(
            f"report.metric={metric}: its name doesn't tell whether more is better", fix, "report.metric", metric
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


def easiest_target(counted: Sequence[Run], metric: Metric) -> Target | None:
    """Return the target that every counted run reached: the worst of their best values."""
    measured = [run.measures[metric.name] for run in counted if metric.name in run.measures]
    bests = [one.best.value for one in measured if one.best]
    worst = max if metric.direction == "min" else min
    return Target(metric.name, "<=" if metric.direction == "min" else ">=", worst(bests)) if bests else None

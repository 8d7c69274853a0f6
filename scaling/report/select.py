"""Sort and filter runs by what is known of them: ``report.sort=val/accuracy report.where="state=finished"``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.limits import one_line
from isobatch.scaling.report.measures import MOST_NAMES, names_there
from isobatch.scaling.report.run import Run
from isobatch.scaling.stopping import NAME, OPERATORS

ALIASES = {
    "run": "directory", "step": "steps", "batch": "global_size", "peak LR": "lr_peak", "time": "time_s",
    "samples/s": "samples_per_s", "ETA": "eta_s", "stopped last by": "cause",
}  # fmt: skip
"""Columns of the table of runs and their names in report.json."""
_CONDITION = re.compile(rf"\s*({'|'.join(ALIASES)}|{NAME})\s*(<=|>=|!=|=|<|>)\s*([^,]*?)\s*")
COMMAS = "separate conditions by commas"


class Condition(NamedTuple):
    """A condition on a run, such as ``state=finished`` or ``val/accuracy>=0.9``."""

    name: str
    sign: str
    value: str

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Return whether a run's values meet the condition. A missing value meets only ``!=``."""
        value = values.get(self.name)
        if self.sign in ("=", "!="):
            return _equal(value, self.value) == (self.sign == "=")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return bool(OPERATORS[self.sign](value, float(self.value)))


def parse_where(text: str) -> list[Condition]:
    """Return the conditions in ``text``, which commas separate. Raises UserError."""
    found = []
    for part in text.split(","):
        match = _CONDITION.fullmatch(part)
        if not match:
            problem = f"report.where={text!r:.200}: {part!r:.100} isn't a condition"
            raise UserError(problem, "write it as in state=finished,val/accuracy>=0.9", "report.where", text)
        condition = Condition(ALIASES.get(match[1], match[1]), match[2], match[3])
        if condition.sign not in ("=", "!=") and not _is_number(condition.value):
            problem = f"report.where={text!r:.200}: {condition.sign} needs a number, not {condition.value!r:.100}"
            fix = COMMAS if " and " in condition.value else "compare text with = or !="
            raise UserError(problem, fix, "report.where", text)
        found.append(condition)
    return found


def chosen(runs: Sequence[Run], where: str | None, sort: str | None) -> list[Run]:
    """Return the runs that meet the conditions, in the order asked for.

    Args:
        where: conditions separated by commas; None: all runs.
        sort: a name: the best value of a measure first, the smallest of others; ``-name`` reverses it.

    Raises:
        UserError: a condition can't be read, or no run has a value of that name.
    """
    conditions = parse_where(where) if where else []
    if not conditions and not sort:
        return list(runs)
    every = [(run, named_values(run)) for run in runs]
    for condition in conditions:
        _refuse_unknown(every, condition.name, "report.where", where)
    left = [(run, values) for run, values in every if all(condition.holds(values) for condition in conditions)]
    if sort:
        column = sort.removeprefix("-")
        name = ALIASES.get(column, column)
        _refuse_unknown(left, name, "report.sort", sort)
        best_is_most = any(run.measures[name].direction == "max" for run, _ in left if name in run.measures)
        left.sort(key=lambda pair: _key(pair[1].get(name)), reverse=best_is_most != (column != sort))
        left.sort(key=lambda pair: pair[1].get(name) is None)  # unknown ones last
    return [run for run, _ in left]


def none_meets(runs: Sequence[Run], where: str) -> UserError:
    """Return the error that no run meets ``report.where``, with the values of each name that no run meets."""
    every, conditions = list(map(named_values, runs)), parse_where(where)
    unmet = [condition for condition in conditions if not any(map(condition.holds, every))]
    there = [_values_there(condition.name, every) for condition in unmet]
    if any(" and " in condition.value for condition in unmet):
        there.append(COMMAS)
    problem = f"none of {counted(len(runs), 'run')} meets report.where={where}"
    return UserError(problem, "; ".join(there) or "some runs meet each of its conditions", "report.where", where)


def _values_there(name: str, every: Sequence[Mapping[str, Any]]) -> str:
    """Return the values of a name with their counts: ``state is finished (15), crashed (1)``."""
    found = Counter(_text(values.get(name)) for values in every).most_common()
    shown = [f"{text} ({count})" for text, count in found[:MOST_NAMES]]
    more = [f"and {len(found) - MOST_NAMES} others"] if len(found) > MOST_NAMES else []
    return f"{name} is {', '.join([*shown, *more])}"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:.6g}" if isinstance(value, float) else one_line(str(value))


def named_values(run: Run) -> dict[str, Any]:
    """Return the values of a run by name: keys of its config, fields of its summary, and measures' last values."""
    summary = run.summary()
    del summary["metrics"], summary["settings"]
    return {**run.recipe.science, **summary, **{name: measure.last for name, measure in run.measures.items()}}


def _refuse_unknown(every: Sequence[tuple[Run, Mapping[str, Any]]], name: str, key: str, value: Any) -> None:
    """Raise UserError if no run has a value of a name, and none could have. Keys that weren't given aren't listed."""
    if not every or any(values.get(name) is not None for _, values in every):
        return
    measures = [known for run, _ in every for known in run.measures]
    fields = [known for known in every[0][1] if known not in every[0][0].recipe.science]
    names = list(dict.fromkeys([*measures, *fields, *(given for run, _ in every for given in run.recipe.given)]))
    if name not in names:
        raise UserError(f"{key}={value}: no run has {name}", names_there(name, names), key, value)


def _equal(value: Any, text: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool) and _is_number(text):
        return math.isclose(value, float(text), rel_tol=1e-9)
    return str(value).lower() == text.lower() or (value is None and text in ("", "null"))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _key(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))

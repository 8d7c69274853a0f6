"""Sort and filter runs by what is known of them: ``report.sort=val/accuracy report.where="state=finished"``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import one_line
from isobatch.scaling.report.run import Run
from isobatch.scaling.stopping import OPERATORS

_CONDITION = re.compile(r"\s*([^\s=<>!,]+)\s*(<=|>=|!=|=|<|>)\s*([^,]*?)\s*")
MOST_NAMES = 40  # in a message


class Condition(NamedTuple):
    """A condition on a run, such as ``state=finished`` or ``val/accuracy>=0.9``."""

    name: str
    sign: str
    value: str

    def holds(self, run: Run) -> bool:
        """Return whether ``run`` meets the condition. A missing value meets only ``!=``."""
        value = value_of(run, self.name)
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
        condition = Condition(*match.groups())
        if condition.sign not in ("=", "!=") and not _is_number(condition.value):
            problem = f"report.where={text!r:.200}: {condition.sign} needs a number, not {condition.value!r:.100}"
            raise UserError(problem, "compare text with = or !=", "report.where", text)
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
    for condition in conditions:
        _refuse_unknown(runs, condition.name, "report.where", where)
    runs = [run for run in runs if all(condition.holds(run) for condition in conditions)]
    if not sort or not runs:
        return runs
    name = sort.removeprefix("-")
    _refuse_unknown(runs, name, "report.sort", sort)
    best_is_most = any(run.measures[name].direction == "max" for run in runs if name in run.measures)
    known = [run for run in runs if value_of(run, name) is not None]
    unknown = [run for run in runs if value_of(run, name) is None]
    return sorted(known, key=lambda run: _key(value_of(run, name)), reverse=best_is_most != (name != sort)) + unknown


def value_of(run: Run, name: str) -> Any:
    """Return the value of a run by name: a field of its summary, a measure's last value, or a key of its config."""
    if name in run.measures:
        return run.measures[name].last
    summary = run.summary()
    return summary[name] if name in summary and name != "metrics" else run.recipe.science.get(name)


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return the names that runs can be sorted and filtered by; keys of the config only if they were given."""
    fields = [name for run in runs[:1] for name in run.summary() if name not in ("metrics", "settings")]
    measures = [name for run in runs for name in run.measures]
    return list(dict.fromkeys([*measures, *fields, *(key for run in runs for key in run.recipe.given)]))


def _refuse_unknown(runs: Sequence[Run], name: str, key: str, value: Any) -> None:
    if not runs or any(value_of(run, name) is not None for run in runs):
        return
    names = names_of(runs)
    if name in names:
        return
    near = "".join(f"did you mean {match}? " for match in get_close_matches(name, names, n=1))
    shown = ", ".join(map(one_line, names[:MOST_NAMES]))
    raise UserError(f"{key}={value}: no run has {name}", f"{near}there are {shown}", key, value)


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

"""Decide from a run's evaluations whether it ends early. Torch-free, and a pure function of what is logged."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
NAME = r"[^\s:<>=!,]+"  # of a measure; the other characters have a meaning in conditions
VALUE = rf"(?:val|ema)/{NAME}"
BOUND = r"\s*(>=|<=|>|<)\s*([-+]?(?:\d{1,99}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,2})?)"  # always finite
AT = rf"({VALUE}){BOUND}"


def refuse_unnameable(name: object, source: str) -> None:
    """Raise UserError if ``stop``, ``report`` and ``checkpoint.best`` can't name a measure that ``source`` returned."""
    if not re.fullmatch(NAME, str(name)):
        problem = f"{source} returned a measure named {name!r:.60}"
        raise UserError(problem, "a name has a character or more, no spaces, and none of :<>=!,", "task._target_")


def parts_of(target: str) -> tuple[str, str, float] | None:
    """Return the name, the sign and the bound of a target such as ``val/accuracy>=0.97``; None if it isn't one."""
    found = re.fullmatch(rf"({NAME}){BOUND}", target)
    return (found[1], found[2], float(found[3])) if found else None


def rules_of(when: str | None, patience: int, min_delta: float, at: str | None) -> list[Plateau | Target]:
    """Return the rules of ``stop.when`` and ``stop.at``, of which either may be None."""
    rules: list[Plateau | Target] = []
    if when is not None:
        name, _, best = when.rpartition(":")
        rules.append(Plateau(name, "max" if best == "max" else "min", patience, min_delta))
    if at is not None:
        rules.append(Target(at))
    return rules


@dataclass(frozen=True, slots=True)
class Plateau:
    """End a run when a value hasn't improved for a while.

    Attributes:
        name: of the value, such as ``val/loss``.
        best: whether the smallest or the largest value is best.
        patience: evaluations in a row without an improvement, after which the run ends.
        min_delta: an improvement has to be larger than this.
    """

    key: ClassVar[str] = "stop.when"
    name: str
    best: Literal["min", "max"]
    patience: int
    min_delta: float

    def cause(self, evaluations: Sequence[Mapping[str, Any]]) -> str:
        """Return why the run ends at the last of its evaluations, or an empty text.

        An evaluation without the value isn't counted. A value that isn't finite (None) is no improvement.
        """
        sign, top, since = 1 if self.best == "max" else -1, None, 0
        for values in evaluations:
            if self.name in values:
                value = values[self.name]
                if value is not None and (top is None or sign * (value - top) > self.min_delta):
                    top, since = value, 0
                else:
                    since += 1
        if since < self.patience:
            return ""
        stuck = "has had no finite value" if top is None else f"hasn't improved on {top:.6g}"
        return f"{self.key}={self.name}:{self.best}: it {stuck} for {counted(since, 'evaluation')}"


@dataclass(frozen=True, slots=True)
class Target:
    """End a run at the first evaluation that reaches a target, such as ``val/accuracy>=0.97``."""

    key: ClassVar[str] = "stop.at"
    text: str

    @property
    def name(self) -> str:
        return self._parts[0]

    @property
    def _parts(self) -> tuple[str, str, float]:
        parts = parts_of(self.text)
        assert parts, self.text
        return parts

    def reached(self, values: Mapping[str, Any]) -> bool:
        """Return whether an evaluation's values reach the target.

        >>> Target("val/accuracy>=0.97").reached({"val/accuracy": 0.98})
        True
        """
        name, sign, bound = self._parts
        value = values.get(name)
        return value is not None and bool(OPERATORS[sign](value, bound))

    def cause(self, evaluations: Sequence[Mapping[str, Any]]) -> str:
        """Return why the run ends at the last of its evaluations, or an empty text."""
        if not evaluations or not self.reached(evaluations[-1]):
            return ""
        return f"{self.key}={self.text}: it is {evaluations[-1][self.name]:.6g}"

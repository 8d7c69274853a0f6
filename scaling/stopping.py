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
EVALUATED = ("val/", "ema/")  # how the names of an evaluation's values begin
NAME = r"[^\s:<>=!,]+"  # of a measure; the other characters have a meaning in conditions
VALUE = rf"(?:val|ema)/{NAME}"
BOUND = r"\s*(>=|<=|>|<)\s*([-+]?(?:\d{1,99}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,2})?)"  # always finite
AT = rf"({VALUE}){BOUND}"


def refuse_unnameable(name: object, source: str) -> None:
    """Raise UserError if ``stop``, ``report`` and ``checkpoint.best`` can't name a measure that ``source`` returned."""
    if not re.fullmatch(NAME, str(name)):
        problem = f"{source} returned a measure named {name!r:.60}"
        raise UserError(problem, "a name has a character or more, no spaces, and none of :<>=!,", "task._target_")


def rules_of(when: str | None, patience: int, min_delta: float, at: str | None) -> list[Plateau | Target]:
    """Return the rules of ``stop.when`` and ``stop.at``, of which either may be None."""
    rules: list[Plateau | Target] = []
    if when is not None:
        name, _, best = when.rpartition(":")
        rules.append(Plateau(name, "max" if best == "max" else "min", patience, min_delta))
    if at is not None and (target := Target.parse(at)):  # the schema has checked it
        rules.append(target)
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
    """A value of a measure to reach, such as ``val/accuracy>=0.97``; ``sign`` is a key of OPERATORS."""

    key: ClassVar[str] = "stop.at"
    name: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target | None:
        """Return the target in ``text``; None if it isn't one.

        >>> Target.parse("val/accuracy>=0.97")
        Target(name='val/accuracy', sign='>=', value=0.97)
        """
        found = re.fullmatch(rf"({NAME}){BOUND}", text)
        return cls(found[1], found[2], float(found[3])) if found else None

    @property
    def direction(self) -> Literal["min", "max"]:
        return "min" if self.sign.startswith("<") else "max"

    def __str__(self) -> str:
        return f"{self.name} {self.sign.replace('<=', '≤').replace('>=', '≥')} {self.value:.4g}"

    def met_by(self, value: float | None) -> bool:
        """Return whether a value reaches the target."""
        return value is not None and bool(OPERATORS[self.sign](value, self.value))

    def cause(self, evaluations: Sequence[Mapping[str, Any]]) -> str:
        """Return why the run ends at the last of its evaluations, or an empty text."""
        value = evaluations[-1].get(self.name) if evaluations else None
        return f"{self.key}={self.name}{self.sign}{self.value:.10g}: it is {value:.6g}" if self.met_by(value) else ""

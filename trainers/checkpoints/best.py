"""Track the best evaluation so far, as in ``checkpoint.best=val/accuracy:max``. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

Evaluation = Mapping[str, float | None]


@dataclass(slots=True)
class Best:
    """Compare evaluations by one value.

    Attributes:
        wanted: ``checkpoint.best`` of the config; None to track nothing.
        value: the best value so far; None if there was no finite one.
        seen: some evaluation had a finite value; ``warned``: the warning about a missing value was given.
    """

    wanted: str | None
    value: float | None = None
    seen: bool = False
    warned: bool = False

    def __post_init__(self) -> None:
        self.seen = self.value is not None

    @property
    def name(self) -> str:
        return (self.wanted or "").rpartition(":")[0]

    def improves(self, values: Evaluation) -> bool:
        """Return whether an evaluation is the best so far. A missing or non-finite value never is."""
        value = values.get(self.name)
        if value is None or not math.isfinite(value):
            return False
        self.seen = True
        if self.value is None:
            return True
        return value > self.value if str(self.wanted).endswith(":max") else value < self.value

    def missing(self, values: Evaluation) -> str | None:
        """Return a warning for the first evaluation that lacks the value, else None."""
        if self.wanted is None or self.warned or self.name in values:
            return None
        self.warned = True
        return f"checkpoint.best={self.wanted}: {missing_value(self.name, values)}"

    def never(self) -> str | None:
        """Return a warning for the end of a run in which no evaluation had the value, else None."""
        if self.wanted is None or self.seen:
            return None
        problem = f"no evaluation of this run had a finite {self.name}"
        return f"checkpoint.best={self.wanted}: {problem}, so there is no checkpoints/best"


def missing_value(name: str, values: Evaluation) -> str:
    """Return a warning that an evaluation lacks a value, with the nearest one that it has."""
    kind, _, own = name.partition("/")
    alike = [other.removeprefix(f"{kind}/") for other in values if other.startswith(kind)]
    near = get_close_matches(own, alike, n=1)
    has = f"{', '.join(values) or 'no values'}{f'; did you mean {kind}/{near[0]}?' if near else ''}"
    return f"this evaluation has no {name}, so it doesn't count; it has {has}"

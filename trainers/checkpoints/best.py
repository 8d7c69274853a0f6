"""The evaluation that is the best so far: ``checkpoint.best=val/accuracy:max``. Torch-free."""

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
        wanted: as in the config; None: no evaluation is the best.
        value: the best so far; None: none was finite.
        seen: some evaluation had a finite value; ``told``: that one lacked it was said.
    """

    wanted: str | None
    value: float | None = None
    seen: bool = False
    told: bool = False

    def __post_init__(self) -> None:
        self.seen = self.value is not None

    @property
    def name(self) -> str:
        return (self.wanted or "").rpartition(":")[0]

    def improves(self, values: Evaluation) -> bool:
        """Return whether an evaluation is the best so far; one whose value is missing or isn't finite never is."""
        value = values.get(self.name)
        if value is None or not math.isfinite(value):
            return False
        self.seen = True
        if self.value is None:
            return True
        return value > self.value if str(self.wanted).endswith(":max") else value < self.value

    def missing(self, values: Evaluation) -> str | None:
        """Return what to say of an evaluation that lacks the value, the first time; None: nothing."""
        if self.wanted is None or self.told or self.name in values:
            return None
        self.told = True
        kind, _, name = self.name.partition("/")
        alike = [other.removeprefix(f"{kind}/") for other in values if other.startswith(kind)]
        near = get_close_matches(name, alike, n=1)
        has = f"{', '.join(values) or 'no values'}{f'; did you mean {kind}/{near[0]}?' if near else ''}"
        return f"checkpoint.best={self.wanted}: this evaluation has no {self.name}, so it isn't the best; it has {has}"

    def never(self) -> str | None:
        """Return what to say at the end of a run in which no evaluation had the value; None: nothing."""
        if self.wanted is None or self.seen:
            return None
        none = f"no evaluation of this run had a finite {self.name}"
        return f"checkpoint.best={self.wanted}: {none}, so there is no checkpoints/best"

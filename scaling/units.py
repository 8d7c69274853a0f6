"""Durations with units, so that a schedule means the same at every batch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import LARGEST

Unit = Literal["ep", "st", "sa", "tok", "%", "min"]

MEANING = {"ep": "epochs", "st": "steps", "sa": "samples", "tok": "tokens", "%": "percent of the run", "min": "minutes"}
EXAMPLES = (
    "10ep (epochs), 5000st (steps), 1e6sa (samples), 2e9tok (tokens), 5% (of the run), "
    "10min (checkpoint.every, stop.after)"
)

_NUMBER_THEN_UNIT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Duration:
    """A non-negative length of training: a number and its unit. All units except minutes convert to samples.

    >>> Duration.parse("10ep"), str(Duration.parse("1e6sa"))
    (Duration(value=10.0, unit='ep'), '1000000sa')
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: object, usual: Sequence[Unit] = ("ep", "st", "sa")) -> Duration:
        """Parse a duration such as ``"10ep"``; a bare 0 needs no unit.

        Args:
            usual: the units that the error for a bare number suggests.

        Raises:
            UserError: the number is missing, negative or too large, or the unit is missing or unknown.
        """
        match = _NUMBER_THEN_UNIT.fullmatch(str(text)) if isinstance(text, str | int | float) else None
        shown = json.dumps(text) if text is None or isinstance(text, bool) else f"{text!r:.100}"
        if match is None or isinstance(text, bool):
            raise UserError(f"{shown} is not a duration", f"write a number and its unit: {EXAMPLES}", value=text)
        value, unit = float(match[1]), match[2].lower()
        if not 0 <= value <= LARGEST:
            fix = f"the number has to be finite, 0 or more, and at most {LARGEST:.0e}"
            raise UserError(f"{shown} is not a duration", fix, value=text)
        if not unit and value == 0:
            unit = "sa"
        if not unit:
            raise UserError(f"{shown} has no unit", _with_units(match[1], usual), value=text)
        if unit not in MEANING:
            raise UserError(f"{shown} has the unknown unit {unit!r:.20}", f"known are: {EXAMPLES}", value=text)
        return cls(value, unit)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return repr(self.value).removesuffix(".0") + self.unit

    def samples(
        self,
        *,
        global_size: int,
        train_samples: int | None = None,
        units_per_sample: int | None = None,
        run_samples: int | None = None,
    ) -> int | None:
        """Return this duration in samples, rounded up.

        Args:
            global_size: samples per optimizer step, for ``st``.
            train_samples: samples per epoch, for ``ep``.
            units_per_sample: tokens per sample, for ``tok``.
            run_samples: samples of the whole run, for ``%``.

        Returns:
            The samples, or None if they depend on a number that isn't known yet (``ep`` and ``%`` before the data is
            opened).
        """
        assert self.unit != "min", "minutes aren't a number of samples"
        assert self.unit != "tok" or units_per_sample, "tokens need a fixed number of tokens per sample"
        share = {"sa": 1, "st": global_size, "ep": train_samples, "%": run_samples, "tok": units_per_sample}[self.unit]
        if share is None:
            return None
        number = Fraction(repr(self.value))  # the exact decimal: 0.1 of 30 is 3, not slightly above and so 4
        if self.unit == "tok":
            return math.ceil(number / share)
        return math.ceil(number * share / (100 if self.unit == "%" else 1))


def _with_units(number: str, units: Sequence[Unit]) -> str:
    """Return the fix for a bare number: the number with each unit that it can have, and their meanings."""
    value = float(number)  # below 1 it may be a share
    fitting = [unit for unit in units if unit != "%" or value <= 100]
    examples = [f"{100 * value:g}%" if unit == "%" and value < 1 else f"{number:.100}{unit}" for unit in fitting]
    *others, last = [MEANING[unit] for unit in fitting]
    meanings = f": {', '.join(others)} or {last}" if others else ""
    return f"write {' or '.join(examples)}{meanings}"

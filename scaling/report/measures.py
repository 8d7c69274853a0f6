"""Tell which direction of a measure is better, and record its last and best values. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

from isobatch.scaling.limits import one_line
from isobatch.scaling.stopping import Target

Direction = Literal["min", "max"]
LOWER = "loss error err perplexity ppl nll ce mse mae rmse wer cer ter fid kl bpb bpc bits distance regret"  # is better
HIGHER = (
    "accuracy acc top1 top5 f1 auc auroc auprc ap map iou miou dice bleu rouge chrf r2 precision recall mcc score "
    "reward return success psnr ssim elo"
)
WORDS: dict[str, Direction] = {**dict.fromkeys(HIGHER.split(), "max"), **dict.fromkeys(LOWER.split(), "min")}

ALIKE = 0.7  # of two names, for one to be taken as a misspelling of the other
MOST_NAMES = 12  # in a message


def direction_of(name: str) -> Direction | None:
    """Return which direction of a measure is better, judged by the words of its name; None if unknown.

    >>> direction_of("val/accuracy"), direction_of("ema/top1_error"), direction_of("val/temperature")
    ('max', 'min', None)
    """
    found = [WORDS[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in WORDS]
    return "min" if "min" in found else "max" if found else None


def names_there(name: str, known: Sequence[str]) -> str:
    """Return the fix for an unknown name: the one that was probably meant, and those there are.

    Names are alike if their last parts are.

    >>> names_there("f1", ["loss", "val/f1"])
    'did you mean val/f1? there are loss, val/f1'
    """

    def likeness(other: str) -> tuple[float, float]:
        last = SequenceMatcher(None, name.rpartition("/")[2], other.rpartition("/")[2]).ratio()
        return last, SequenceMatcher(None, name, other).ratio()

    best = max(known, key=likeness, default="")
    meant = f"did you mean {one_line(best)}? " if best and likeness(best)[0] >= ALIKE else ""
    more = f" and {len(known) - MOST_NAMES} others" if len(known) > MOST_NAMES else ""
    return f"{meant}there are {', '.join(map(one_line, known[:MOST_NAMES]))}{more}"


class Record(NamedTuple):
    """A value that was better than all before it, and where it was measured."""

    value: float
    step: int
    samples: int
    time_s: float | None


@dataclass(slots=True)
class Measure:
    """The values of one measure of a run.

    Attributes:
        direction: which direction is better; None if unknown, which leaves ``records`` empty.
        last: the last value; None if it wasn't finite.
        records: each value that was the best so far, in order. The first to reach any target is among them.
    """

    direction: Direction | None
    last: float | None = None
    records: list[Record] = field(default_factory=list)

    @property
    def best(self) -> Record | None:
        return self.records[-1] if self.records else None

    def add(self, value: float | None, line: Mapping[str, Any]) -> None:
        """Add a value from a line, which says where it was measured."""
        self.last = value if value is not None and math.isfinite(value) else None
        if self.last is None or self.direction is None:
            return
        if self.records:
            top = self.records[-1].value
            if self.last >= top if self.direction == "min" else self.last <= top:
                return
        self.records.append(Record(self.last, line.get("step", 0), line.get("samples", 0), line.get("time_s")))

    def summary(self) -> dict[str, Any]:
        """Return the measure as plain values."""
        best = self.best
        return {"last": self.last, "best": best and best.value, "best_step": best and best.step}


def first_reaching(target: Target, measures: Mapping[str, Measure]) -> Record | None:
    """Return the first measurement that reached a target; None if there is none."""
    records = measures[target.name].records if target.name in measures else []
    return next((record for record in records if target.met_by(record.value)), None)

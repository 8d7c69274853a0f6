"""Rows of the fault table. Each causes a real fault, and compares the run with an undisturbed one."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.case import Case
from tests.faults.task import Fault, fault

CAUSE_CHARS = 200  # of a cause, as the table shows it


def signalled(name: str, at: str, call: int = 1, to: str = "launcher", rank: int = 0) -> Fault:
    """Return a signal that the task sends to its launcher or to itself."""
    return fault(name, at, call, rank, to=to)


NORM = ("task.args.norm=true", "on_nonfinite=skip")

REFERENCES: dict[str, Callable[[Case], object]] = {
    "plain": lambda case: case.goes_on(),
    "skipping": lambda case: case.goes_on(
        "cluster.gpus_per_node=1", "on_nonfinite=skip", faults=[fault("nan", "step", 30)]
    ),
    "skipping with BatchNorm": lambda case: case.goes_on(*NORM, faults=[fault("nan", "step", 30, 1)]),
    "extended": lambda case: (case.goes_on("duration=2ep"), case.goes_on()),
    "adamw": lambda case: case.goes_on("optimizer=adamw", "ema=100sa"),
    "stopped": lambda case: case.stopped(case.start(faults=[signalled("SIGTERM", "step", 45)]), "SIGTERM"),
}


class References:
    """Runs of one engine to compare with or to start from, each created on first use.

    Args:
        engine: what names it on the command line.
    """

    def __init__(self, folder: Path, engine: tuple[str, ...] = ()) -> None:
        self._folder, self.engine = folder, engine
        self._locks = {name: threading.Lock() for name in REFERENCES}
        self._made: dict[str, Case] = {}

    def __call__(self, name: str) -> Case:
        with self._locks[name]:
            if name not in self._made:
                case = Case(self._folder / name, self.engine)
                REFERENCES[name](case)
                self._made[name] = case
        return self._made[name]


Act = Callable[[Case, References], None]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        fault: what is done, and how; ``ranks``: before and after.
        reference: the uninterrupted run that it has to be.
        everywhere: `make faults` has it on every engine.
    """

    fault: str
    ranks: str
    act: Act
    reference: str
    everywhere: bool = False

    def __call__(self, folder: Path, references: References) -> dict[str, str]:
        """Its cells.

        Raises:
            Broken: it doesn't hold.
        """
        case = Case(folder, references.engine)
        self.act(case, references)
        compared = case.compared(references(self.reference))
        case.remove()
        ends = [f"{end} ({case.ends.count(end)} ×)" if case.ends.count(end) > 1 else end for end in case.ends]
        causes = [_shortened(cause, case) for cause in case.causes]
        return {
            "fault": self.fault,
            "ranks": self.ranks,
            "ended": "; ".join(dict.fromkeys(ends)),
            "cause named": "; ".join(dict.fromkeys(causes)),
            **compared,
        }


def _shortened(cause: str, case: Case) -> str:
    """Remove paths, and values that differ from run to run."""
    cause = re.sub(r"pid \d+", "pid N", cause.replace(str(case.run), "DIR"))
    cause = re.sub(r"host \S+,", "host H,", re.sub(r"since [\d-]+ [\d:]+", "since T", cause))
    cause = cause.replace("|", r"\|")
    cause = re.sub(r":\d{4,5}\b", ":P", cause).replace("[/__w/pytorch/pytorch/third_party/gloo/gloo/", "[")
    return cause if len(cause) <= CAUSE_CHARS else f"{cause[:CAUSE_CHARS]}…"


ROWS: dict[str, list[Row]] = {}  # by section


def section(title: str) -> None:
    """Start a new section, to which the following rows belong."""
    ROWS[title] = []


def row(fault: str, ranks: str = "2 → 2", reference: str = "plain", everywhere: bool = False) -> Callable[[Act], Act]:
    """Add a row to the current section."""

    def add(act: Act) -> Act:
        list(ROWS.values())[-1].append(Row(fault, ranks, act, reference, everywhere))
        return act

    return add

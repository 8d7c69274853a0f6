"""Collect the rows of the fault table. Each causes a real fault and compares the run with an uninterrupted one."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.case import Case
from tests.faults.task import Fault, fault

CAUSE_CHARS = 200  # characters of a cause that the table shows


def signalled(name: str, at: str, call: int = 1, to: str = "launcher", rank: int = 0) -> Fault:
    """Return a fault: the task sends a signal to its launcher or to itself."""
    return fault(name, at, call, rank, to=to)


NORM = ("task.args.norm=true", "on_nonfinite=skip")

REFERENCES: dict[str, Callable[[Case], object]] = {
    "plain": lambda case: case.run_to_end(),
    "skipping": lambda case: case.run_to_end(
        "cluster.gpus_per_node=1", "on_nonfinite=skip", faults=[fault("nan", "step", 30)]
    ),
    "skipping with BatchNorm": lambda case: case.run_to_end(*NORM, faults=[fault("nan", "step", 30, 1)]),
    "extended": lambda case: (case.run_to_end("duration=2ep"), case.run_to_end()),
    "adamw": lambda case: case.run_to_end("optimizer=adamw", "ema=100sa"),
    "stopped": lambda case: case.expect_stop(case.start(faults=[signalled("SIGTERM", "step", 45)]), "SIGTERM"),
}


class References:
    """Runs of one engine to compare with or to start from, each created on first use.

    Args:
        engine: the overrides that choose it.
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
        fault: the fault, and how it is caused.
        ranks: number of ranks before and after.
        reference: name of the uninterrupted run that the result must equal.
        everywhere: cause it on every engine in `make faults`.
    """

    fault: str
    ranks: str
    act: Act
    reference: str
    everywhere: bool = False

    def __call__(self, folder: Path, references: References) -> dict[str, str]:
        """Cause the fault, and return the row's cells.

        Raises:
            Broken: the row doesn't hold.
        """
        case = Case(folder, references.engine)
        self.act(case, references)
        compared = case.compare(references(self.reference))
        case.remove()
        ends = [f"{end} ({case.ends.count(end)} ×)" if case.ends.count(end) > 1 else end for end in case.ends]
        causes = [_shortened(cause, case) for cause in case.causes]
        return {
            "fault": self.fault,
            "ranks": self.ranks,
            "ended": "; ".join(dict.fromkeys(ends)),
            "recorded cause": "; ".join(dict.fromkeys(causes)),
            **compared,
        }


def _shortened(cause: str, case: Case) -> str:
    """Return a cause without paths and values that differ from run to run."""
    cause = re.sub(r"pid \d+", "pid N", cause.replace(str(case.run), "DIR"))
    cause = re.sub(r"host \S+,", "host H,", re.sub(r"since [\d-]+ [\d:]+", "since T", cause))
    cause = cause.replace("|", r"\|")
    cause = re.sub(r":\d{4,5}\b", ":P", cause).replace("[/__w/pytorch/pytorch/third_party/gloo/gloo/", "[")
    return cause if len(cause) <= CAUSE_CHARS else f"{cause[:CAUSE_CHARS]}…"


ROWS: dict[str, list[Row]] = {}  # by section


def section(title: str) -> None:
    """Start a new section for the following rows."""
    ROWS[title] = []


def row(fault: str, ranks: str = "2 → 2", reference: str = "plain", everywhere: bool = False) -> Callable[[Act], Act]:
    """Add a row to the current section."""

    def add(act: Act) -> Act:
        list(ROWS.values())[-1].append(Row(fault, ranks, act, reference, everywhere))
        return act

    return add
